"""Projection and residual: the contract, its checks, and what computes it."""

from collections.abc import Callable

from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_shape, check_tensors
from braidsdk.kernels.measure import measured
from braidsdk.kernels.out_proj.eager import out_proj_torch
from braidsdk.kernels.out_proj.launch import out_proj_triton
from braidsdk.kernels.out_proj.native import out_proj_native
from braidsdk.kernels.weight import Weight

BACKENDS: dict[Backend, Callable[..., Tensor]] = {
    "torch": out_proj_torch,
    "native": out_proj_native,
    "triton": out_proj_triton,
}


@measured("out_proj")
def out_proj(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor, *, backend: Backend = "torch") -> Tensor:
    """`residual + x @ weight.T + bias`; by all backends but torch summed in float32 and rounded once.

    Args:
        x: [tokens, size].
        weight: [hidden, size].
        bias: [hidden], or None.
        residual: [tokens, hidden].
        backend: what computes it; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16; "native" contiguous ones in bfloat16 on the CPU.

    Returns:
        [tokens, hidden], the dtype of `x`.

    Raises:
        RuntimeError: the backend can't run here.
        ValueError: shapes, dtypes or strides are not as above.
    """
    op, (rows, size), hidden = "out_proj", x.shape, weight.shape[0]
    check_tensors(op, backend, x, weight, bias, residual)
    check_shape(op, "weight", weight, hidden, size)
    check_shape(op, "residual", residual, rows, hidden)
    if bias is not None:
        check_shape(op, "bias", bias, hidden)
    return BACKENDS[backend](x, weight, bias, residual)
