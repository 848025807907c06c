"""RMSNorm, gate and up projections and SwiGLU: the contract, its checks, and what computes it."""

from collections.abc import Callable

from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_shape, check_tensors
from braidsdk.kernels.measure import measured
from braidsdk.kernels.swiglu.eager import norm_swiglu_torch
from braidsdk.kernels.swiglu.launch import norm_swiglu_triton
from braidsdk.kernels.swiglu.native import norm_swiglu_native
from braidsdk.kernels.weight import Weight

BACKENDS: dict[Backend, Callable[..., Tensor]] = {
    "torch": norm_swiglu_torch,
    "native": norm_swiglu_native,
    "triton": norm_swiglu_triton,
}


@measured("swiglu")
def norm_swiglu(hidden: Tensor, norm: Tensor, gate_up: Weight, eps: float, *, backend: Backend = "torch") -> Tensor:
    """`silu(gate(x)) * up(x)` with `x` the normed hidden states.

    Args:
        hidden: [tokens, hidden].
        norm: weights of the norm, [hidden].
        gate_up: gate and up projections stacked in this order, [2 * intermediate, hidden].
        eps: of the norm.
        backend: what computes it; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16; "native" contiguous ones in bfloat16 on the CPU.

    Returns:
        [tokens, intermediate], the dtype of `hidden`.

    Raises:
        RuntimeError: the backend can't run here.
        ValueError: shapes, dtypes or strides are not as above.
    """
    op, size = "norm_swiglu", hidden.shape[1]
    check_tensors(op, backend, hidden, norm, gate_up)
    check_shape(op, "norm", norm, size)
    check_shape(op, "gate_up", gate_up, gate_up.shape[0] // 2 * 2, size)
    return BACKENDS[backend](hidden, norm, gate_up, eps)
