"""RMSNorm, torch reference (Zhang and Sennrich 2019, arXiv:1910.07467; rounding as in Qwen3)."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension by its root mean square, then scale it.

    Variance and scaling are computed in float32 (float64 for float64 inputs) and rounded to the dtype of `x` *before*
    the multiplication by the weight, as Qwen3 does: the other order changes results where weights are large.

    Args:
        x: [..., size].
        weight: [size], same dtype.
        eps: added to the mean square.

    Returns:
        [..., size], the dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
