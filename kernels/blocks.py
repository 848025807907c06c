"""Elementwise work on a CPU, a block of rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

_ELEMENTS = 1 << 18
"""Of a block: in float32 they stay in the cores' caches from one operation to the next."""


def in_blocks(compute: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`compute(*rows)` for tensors that agree in their first dimension, where each row of the result needs its own rows
    alone. Off the CPU, and of few rows, all at once.

    Args:
        compute: takes a block of each tensor, and gives a block of the result.
        rows: tensors; the first one's size decides how many rows make a block.
    """
    first = rows[0]
    step = max(1, _ELEMENTS * len(first) // max(1, first.numel()))
    if first.device.type != "cpu" or len(first) <= step:
        return compute(*rows)
    starts = range(0, len(first), step)
    return torch.cat([compute(*(tensor[start : start + step] for tensor in rows)) for start in starts])
