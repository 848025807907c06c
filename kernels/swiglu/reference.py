"""RMSNorm, gate and up projections, SwiGLU, torch reference (Shazeer 2020, arXiv:2002.05202)."""

from torch import Tensor
from torch.nn.functional import silu

from braidsdk.kernels.blocks import in_blocks
from braidsdk.kernels.projection import project
from braidsdk.kernels.rms_norm.reference import rms_norm_reference


def norm_swiglu_reference(hidden: Tensor, norm: Tensor, gate_up: Tensor, eps: float) -> Tensor:
    """`silu(gate(x)) * up(x)` with `x` the normed hidden states.

    Args:
        hidden: [tokens, hidden].
        norm: weights of the norm, [hidden].
        gate_up: gate and up projections stacked in this order, [2 * intermediate, hidden].
        eps: of the norm.

    Returns:
        [tokens, intermediate], the dtype of `hidden`.
    """

    def swiglu(products: Tensor) -> Tensor:
        gate, up = products.chunk(2, dim=-1)
        return silu(gate) * up

    normed = in_blocks(lambda block: rms_norm_reference(block, norm, eps), hidden)
    return in_blocks(swiglu, project(normed, gate_up))
