"""Projection and residual, plainly."""

from torch import Tensor
from torch.nn.functional import linear


def out_proj_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """What `op.out_proj` computes; arguments as there."""
    return residual + linear(x, weight, bias)
