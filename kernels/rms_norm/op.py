"""RMSNorm: checks, and which implementation runs."""

from typing import Literal

import torch
from torch import Tensor

from braidsdk.kernels.launch import check_shape, check_triton, launch_options
from braidsdk.kernels.rms_norm.reference import rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, path: Literal["triton", "torch"] = "torch") -> Tensor:
    """Normalise the last dimension by its root mean square, then scale it.

    Args:
        x: [..., size]; for Triton contiguous, in float32, bfloat16 or float16.
        weight: [size], same dtype.
        eps: added to the mean square.
        path: which implementation; neither falls back to the other.

    Returns:
        [..., size], the dtype of `x`.

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: Triton was asked for, and shapes, dtypes or strides are not as above.
    """
    if path == "torch":
        return rms_norm_reference(x, weight, eps)
    check_triton("rms_norm", x, weight)
    size = x.shape[-1]
    check_shape("rms_norm", "weight", weight, size)
    out = torch.empty_like(x)
    if out.numel():
        from braidsdk.kernels.rms_norm.kernel import rms_norm_kernel

        block = 1 << (size - 1).bit_length()
        warps = min(max(block // 512, 1), 16)
        options = launch_options(x.device)
        rms_norm_kernel[(x.numel() // size,)](x, weight, out, eps, size, block, num_warps=warps, **options)
    return out
