"""A weight matrix where it already lies: one tensor, or blocks of rows that lie apart in a mapped file."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A weight [out, in] as consecutive blocks of its rows, which share dtype and device.

    Attributes:
        parts: the blocks in order, each [rows, in].
    """

    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all blocks."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of all blocks."""
        return self.parts[0].device

    def whole(self) -> Tensor:
        """One tensor, which is a copy."""
        return torch.cat(self.parts)


Weight = Tensor | Rows
"""A weight as a kernel may get it. Only kernels that say so read `Rows`."""


def whole(weight: Weight) -> Tensor:
    """The weight as one tensor. `Rows` are copied."""
    return weight.whole() if isinstance(weight, Rows) else weight
