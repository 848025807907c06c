"""What all layers of a forward pass share about its shifts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from braidsdk.kernels.paging import Shift
from braidsdk.kernels.rope import RotaryTable


@dataclass(frozen=True)
class Shifts:
    """The shifts of one pass; their tokens stand one shift behind the other, and tensors lie on the model's device.

    Attributes:
        fresh: slots of the tokens as computed again, int64 [tokens].
        stored: their slots in their entries, int64 [tokens].
        owners: which shift each token belongs to, int64 [tokens].
        starts: the first token of each shift, and behind them the number of tokens, int64 [shifts + 1].
        targets: the slot that each shift is written to, int64 [shifts].
        cos, sin: the rotation of keys from where `fresh` is to the frame of each entry, and of a length that undoes
            that of the model's rotations, [shifts, head_dim / 2].
        weights: factor on the sum over each shift's tokens, float32 (float64 with such angles) [shifts].
    """

    fresh: Tensor
    stored: Tensor
    owners: Tensor
    starts: Tensor
    targets: Tensor
    cos: Tensor
    sin: Tensor
    weights: Tensor


def plan_shifts(shifts: Sequence[Shift], rotary: RotaryTable) -> Shifts:
    """Put shifts, at least one, on the model's device."""
    counts = [len(shift.fresh) for shift in shifts]
    cos, sin = rotary.table(1 + max(shift.turn for shift in shifts))
    columns = (
        torch.cat([shift.fresh for shift in shifts]),
        torch.cat([shift.stored for shift in shifts]),
        torch.arange(len(shifts)).repeat_interleave(torch.tensor(counts)),
        torch.tensor([0, *accumulate(counts)]),
        torch.tensor([shift.target for shift in shifts]),
        torch.tensor([shift.turn for shift in shifts]),
    )
    moved = torch.cat(columns).to(cos.device).split([len(column) for column in columns])  # in one copy
    fresh, stored, owners, starts, targets, turns = moved
    weights = [shift.weight / count for shift, count in zip(shifts, counts, strict=True)]
    length = rotary.attention_factor**2
    return Shifts(
        fresh,
        stored,
        owners,
        starts,
        targets,
        cos[turns] / length,
        -sin[turns] / length,
        torch.tensor(weights, dtype=cos.dtype, device=cos.device),
    )
