"""Projection and residual by the C kernels, in one pass over the weight."""

import torch
from torch import Tensor

from braidsdk.kernels.products.native import SUMS, run
from braidsdk.kernels.weight import Weight


def out_proj_native(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor) -> Tensor:
    """What `op.out_proj` computes, rounded once."""
    rows, size = x.shape
    out = torch.empty_like(residual)
    run(
        kind=SUMS,
        rows=rows,
        columns=size,
        outputs=weight.shape[0],
        x=x,
        weight=weight,
        bias=bias,
        out=out,
        residual=residual,
    )
    return out
