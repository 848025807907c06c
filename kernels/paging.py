"""The layout of paged KV memory, and how new tokens get into it.

One layer's memory is a tensor `kv` of shape [2, pages, kv_heads, page_size, head_dim]; index 0 holds keys, rotated in
their segment's own frame, index 1 holds values. Heads are outermost inside a page, so the tile of one head is
contiguous. A slot is `page * page_size + offset`.
"""

from dataclasses import dataclass

from torch import Tensor

BLOCK = 32
"""Entries that share a page begin at multiples of so many slots. Attention on a CPU reads that many keys at once."""


@dataclass(frozen=True)
class PagedSegment:
    """A token slice of one KV entry in paged memory, placed at an absolute position.

    A page may hold several small entries. So places are counted from the first slot of the entry's first page, and
    token j is in place `offset + j`. An entry that has its pages to itself has offset 0: there places are tokens.

    Attributes:
        pages: page ids of the entry, int64 [pages], on the CPU.
        start: place of the slice's first token.
        stop: one past the place of its last token.
        origin: absolute position of the entry's token 0; key j sits at `origin + j`. May be negative for a slice.
        hidden: by place, keys of the entry that no row sees, bool [stop] or longer, on the CPU; None hides none.
        shift: a slot of the same memory. Its key, in the frame of the entry, is added to each of these keys, and its
            value to each of the values. None adds nothing.
        offset: place of the entry's token 0.
    """

    pages: Tensor
    start: int
    stop: int
    origin: int
    hidden: Tensor | None = None
    shift: int | None = None
    offset: int = 0

    @property
    def first(self) -> int:
        """Absolute position of the slice's first token."""
        return self.origin - self.offset + self.start

    @property
    def changed(self) -> bool:
        """Whether its keys are not all seen as they are stored."""
        return self.hidden is not None or self.shift is not None


@dataclass(frozen=True)
class Request:
    """Rows of a batch that attend to the same segments.

    Attributes:
        rows: their place among the batch's tokens.
        segments: all that they may see, the segment that holds their own keys included.
    """

    rows: slice
    segments: tuple[PagedSegment, ...]


def append(kv: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write the keys and values of new tokens into one layer's memory, in place.

    Args:
        kv: one layer's memory, [2, pages, kv_heads, page_size, head_dim].
        slots: where each token goes, int64 [tokens].
        keys: [tokens, kv_heads, head_dim], rotated in the frame of the segment they belong to.
        values: [tokens, kv_heads, head_dim].
    """
    page_size = kv.shape[3]
    pages, offsets = slots // page_size, slots % page_size
    kv[0, pages, :, offsets] = keys
    kv[1, pages, :, offsets] = values


def slots_of(pages: Tensor, places: Tensor, page_size: int) -> Tensor:
    """Slots on `pages` by places, as `PagedSegment` counts them, int64 [tokens]: int64 [tokens]."""
    return pages[places // page_size] * page_size + places % page_size


@dataclass(frozen=True)
class Shift:
    """The mean by which some tokens of an entry move when they are computed again, kept as a key and a value.

    Attributes:
        fresh: slots of these tokens as computed again, int64 [tokens], on the CPU.
        stored: their slots in the entry, int64 [tokens], on the CPU.
        target: the slot that gets it.
        turn: by how many positions keys are rotated more in `fresh` than in the entry.
        weight: factor on the mean.
    """

    fresh: Tensor
    stored: Tensor
    target: int
    turn: int
    weight: float
