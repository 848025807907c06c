"""Shifts, one by one."""

from torch import Tensor

from braidsdk.kernels.rope import rotate
from braidsdk.kernels.shift.plan import Shifts


def apply_shifts_reference(kv: Tensor, shifts: Shifts) -> None:
    """What `op.apply_shifts` does; arguments as there."""
    size, starts = kv.shape[3], shifts.starts.tolist()
    for at, target in enumerate(shifts.targets.tolist()):
        tokens = slice(starts[at], starts[at + 1])
        (fresh_keys, keys), (fresh_values, values) = (
            [
                half[slots // size, :, slots % size].to(shifts.cos.dtype)
                for slots in (shifts.fresh[tokens], shifts.stored[tokens])
            ]
            for half in kv
        )
        turned = rotate(fresh_keys, shifts.cos[at, None], shifts.sin[at, None])
        kv[0, target // size, :, target % size] = ((turned - keys).sum(0) * shifts.weights[at]).to(kv.dtype)
        kv[1, target // size, :, target % size] = ((fresh_values - values).sum(0) * shifts.weights[at]).to(kv.dtype)
