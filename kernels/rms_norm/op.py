"""RMSNorm: the contract, its checks, and what computes it."""

from collections.abc import Callable

from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_shape, check_tensors
from braidsdk.kernels.rms_norm.launch import rms_norm_triton
from braidsdk.kernels.rms_norm.reference import rms_norm_reference

BACKENDS: dict[Backend, Callable[[Tensor, Tensor, float], Tensor]] = {
    "torch": rms_norm_reference,
    "triton": rms_norm_triton,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "torch") -> Tensor:
    """Normalise the last dimension by its root mean square, then scale it.

    Args:
        x: [..., size]; for Triton contiguous, in float32, bfloat16 or float16.
        weight: [size], same dtype.
        eps: added to the mean square.
        backend: "torch" or "triton"; neither falls back to the other.

    Returns:
        [..., size], the dtype of `x`.

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: shapes, dtypes or strides are not as above.
    """
    check_tensors("rms_norm", backend, x, weight)
    check_shape("rms_norm", "weight", weight, x.shape[-1])
    return BACKENDS[backend](x, weight, eps)
