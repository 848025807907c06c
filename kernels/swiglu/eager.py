"""RMSNorm, gate and up projections and SwiGLU by torch, fast: in blocks, and over a packed weight."""

from torch import Tensor
from torch.nn.functional import silu

from braidsdk.kernels.blocks import in_blocks
from braidsdk.kernels.projection import project
from braidsdk.kernels.rms_norm.reference import rms_norm_reference
from braidsdk.kernels.weight import Int8


def norm_swiglu_torch(hidden: Tensor, norm: Tensor, gate_up: Tensor | Int8, eps: float) -> Tensor:
    """What `op.norm_swiglu` computes; the projections may be one of `projection.pack`."""

    def swiglu(products: Tensor) -> Tensor:
        gate, up = products.chunk(2, dim=-1)
        return silu(gate) * up

    normed = in_blocks(lambda block: rms_norm_reference(block, norm, eps), hidden)
    return in_blocks(swiglu, project(normed, gate_up))
