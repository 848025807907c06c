"""Shifts by torch: as many calls for many of them as for one."""

import torch
from torch import Tensor

from braidsdk.kernels.rope import rotate
from braidsdk.kernels.shift.plan import Shifts


def apply_shifts_torch(kv: Tensor, shifts: Shifts) -> None:
    """What `op.apply_shifts` does; arguments as there."""
    size, owners = kv.shape[3], shifts.owners
    fresh, stored = (  # [tokens, 2, kv_heads, head_dim]
        kv[:, slots // size, :, slots % size].to(shifts.cos.dtype) for slots in (shifts.fresh, shifts.stored)
    )
    turned = rotate(fresh[:, 0], shifts.cos[owners], shifts.sin[owners])
    moved = torch.stack((turned, fresh[:, 1]), 1) - stored
    sums = moved.new_zeros(len(shifts.targets), *moved.shape[1:]).index_add_(0, owners, moved)
    means = sums * shifts.weights[:, None, None, None]
    kv[:, shifts.targets // size, :, shifts.targets % size] = means.to(kv.dtype)
