"""Shifts: the contract, its checks, and what computes them."""

from collections.abc import Callable

from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_shape, check_tensors
from braidsdk.kernels.shift.eager import apply_shifts_torch
from braidsdk.kernels.shift.launch import apply_shifts_triton
from braidsdk.kernels.shift.plan import Shifts

BACKENDS: dict[Backend, Callable[[Tensor, Shifts], None]] = {
    "torch": apply_shifts_torch,
    "native": apply_shifts_torch,  # a few calls a layer
    "triton": apply_shifts_triton,
}


def apply_shifts(kv: Tensor, shifts: Shifts, *, backend: Backend = "torch") -> None:
    """Compute shifts from one layer's memory, and write them there: the mean of what was computed again less what is
    stored, keys in the entry's frame, times the shift's weight. Sums are in the dtype of the angles.

    Args:
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim]; for Triton contiguous, in float32,
            bfloat16 or float16. The slots of `targets` are written in place.
        shifts: from `plan_shifts`.
        backend: what computes it; none falls back to another.

    Raises:
        RuntimeError: the backend can't run here.
        ValueError: shape, dtype or strides are not as above.
    """
    check_tensors("apply_shifts", backend, kv)
    check_shape("apply_shifts", "cos", shifts.cos, len(shifts.targets), kv.shape[4] // 2)
    BACKENDS[backend](kv, shifts)
