"""RMSNorm, gate and up projections and SwiGLU, plainly (Shazeer 2020, arXiv:2002.05202)."""

from torch import Tensor
from torch.nn.functional import linear, silu

from braidsdk.kernels.rms_norm.reference import rms_norm_reference


def norm_swiglu_reference(hidden: Tensor, norm: Tensor, gate_up: Tensor, eps: float) -> Tensor:
    """What `op.norm_swiglu` computes; arguments as there."""
    gate, up = linear(rms_norm_reference(hidden, norm, eps), gate_up).chunk(2, dim=-1)
    return silu(gate) * up
