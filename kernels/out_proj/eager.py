"""Projection and residual by torch."""

from torch import Tensor

from braidsdk.kernels.projection import project
from braidsdk.kernels.weight import Int8


def out_proj_torch(x: Tensor, weight: Tensor | Int8, bias: Tensor | None, residual: Tensor) -> Tensor:
    """What `op.out_proj` computes; the weight may be one of `projection.pack`."""
    return project(x, weight, bias, residual)
