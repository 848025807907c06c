"""RMSNorm, gate and up projections and SwiGLU by the C kernels, in one pass over the weight."""

from torch import Tensor

from braidsdk.kernels.products.native import GATES, run
from braidsdk.kernels.weight import Weight


def norm_swiglu_native(hidden: Tensor, norm: Tensor, gate_up: Weight, eps: float) -> Tensor:
    """What `op.norm_swiglu` computes, rounded once."""
    (rows, size), inner = hidden.shape, gate_up.shape[0] // 2
    out = hidden.new_empty(rows, inner)
    run(
        kind=GATES,
        rows=rows,
        columns=size,
        outputs=inner,
        x=hidden,
        norm=norm,
        weight=gate_up,
        eps=eps,
        out=out,
    )
    return out
