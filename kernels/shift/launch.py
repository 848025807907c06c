"""Shifts by Triton: the launch."""

from torch import Tensor

from braidsdk.kernels.launch import launch_options, padded
from braidsdk.kernels.shift.plan import Shifts

_BLOCK = 32
"""Tokens that a program adds at once."""


def apply_shifts_triton(kv: Tensor, shifts: Shifts) -> None:
    """What `op.apply_shifts` does; arguments as there."""
    from braidsdk.kernels.shift.kernel import shift_kernel

    _, _, kv_heads, page_size, head_dim = kv.shape
    shift_kernel[(len(shifts.targets), kv_heads, 2)](
        kv,
        kv[0].numel(),
        shifts.fresh,
        shifts.stored,
        shifts.starts,
        shifts.targets,
        shifts.cos,
        shifts.sin,
        shifts.weights,
        kv_heads,
        head_dim,
        padded(head_dim),
        page_size,
        _BLOCK,
        num_warps=4,
        **launch_options(kv.device),
    )
