"""What a weight matrix may be: a tensor, rows where they lie in a mapped file, or 8-bit integers with scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from braidsdk.kernels.memory import empty

GROUP = 128
"""Columns of an int8 weight that share a scale."""

_PIECE = 1 << 20
"""Numbers of a piece that torch converts for a product."""

_AT_ONCE = 1 << 16
"""Numbers that are quantised together: conversions stay in a CPU's cache, and take little memory beside the result."""


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


@dataclass(frozen=True)
class Int8:
    """A weight [out, in] in 8-bit integers: element [o, i] is `values[o, i] * scales[o, i // GROUP]`.

    Attributes:
        values: int8 [out, in], from -127 to 127.
        scales: float32 [out, groups]; the last group of a row may be shorter.
    """

    values: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device

    def pieces(self) -> "list[Int8]":
        """Consecutive rows of it, few enough for a CPU's cache."""
        rows = max(1, _PIECE // self.values.shape[1])
        return [Int8(*piece) for piece in zip(self.values.split(rows), self.scales.split(rows), strict=True)]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for, rounded once to `dtype`: [out, in]."""
        scales = self.scales.repeat_interleave(GROUP, 1)[:, : self.values.shape[1]]
        return (self.values * scales.to(torch.promote_types(dtype, torch.float32))).to(dtype)


Weight = Tensor | Rows | Int8
"""A weight as an operation may get it. Only the C kernels read `Rows`."""


def whole(weight: Tensor | Rows) -> Tensor:
    """The weight as one tensor. `Rows` are copied."""
    return weight.whole() if isinstance(weight, Rows) else weight


def in_one_piece(weight: Weight) -> Tensor | Int8:
    """The weight, which must not be `Rows`.

    Raises:
        ValueError: it is.
    """
    if isinstance(weight, Rows):
        raise ValueError(f"expected a weight in one piece, got {len(weight.parts)} blocks of rows; take it unmapped.")
    return weight


def dense(weight: Tensor | Int8, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor: one that is a tensor as it is, `Int8` in this dtype."""
    return weight.dense(dtype) if isinstance(weight, Int8) else weight


def quantised(weight: Tensor | Rows) -> Int8:
    """A weight in 8-bit integers, rounded to nearest, symmetric: in each group of a row the largest magnitude is 127
    (Dettmers et al. 2022, arXiv:2208.07339, by group instead of by row).

    Args:
        weight: [out, in], in a floating-point dtype.
    """
    parts = weight.parts if isinstance(weight, Rows) else (weight,)
    (out, size), device = weight.shape, weight.device
    values = empty((out, size), torch.int8, device)
    scales = torch.empty(out, -(-size // GROUP), dtype=torch.float32, device=device)
    pieces = (piece for part in parts for piece in part.split(max(1, _AT_ONCE // size)))
    start = 0
    for piece in pieces:
        rows = slice(start, start + len(piece))
        padded = torch.nn.functional.pad(piece.float(), (0, -size % GROUP)).unflatten(1, (-1, GROUP))
        scale = padded.abs().amax(2) / 127
        steps = padded.div_(scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_()
        values[rows] = steps.flatten(1)[:, :size]
        scales[rows] = scale
        start = rows.stop
    return Int8(values, scales)
