"""Pages that small entries share.

A page is cut into blocks. An entry takes 1, 2, 4 ... of them, side by side, the first a multiple of how many they are,
as in buddy allocation. So in whatever order entries come, they open no more fresh pages than their blocks fill.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from braidsdk.kernels.paging import BLOCK


@dataclass
class _Page:
    """A page: a bit for each block that is taken, and how many entries on it are pinned."""

    taken: int = 0
    pinned: int = 0


class SharedPages:
    """Which blocks of which pages are taken, and on which pages nothing is pinned."""

    def __init__(self, page_size: int) -> None:
        """No page yet.

        Args:
            page_size: slots of a page. If they are no power of two of blocks, entries share none.
        """
        count = page_size // BLOCK
        self.blocks = count if page_size == BLOCK * count and count & (count - 1) == 0 else 1
        self._pages: dict[int, _Page] = {}
        self._with_gaps: dict[tuple[bool, int], dict[int, None]] = {}  # by whether something is pinned, and `taken`

    def blocks_for(self, tokens: int) -> int:
        """Blocks that an entry of so many tokens takes; 0 if it gets pages of its own."""
        size = 1 << (-(-tokens // BLOCK) - 1).bit_length() if tokens > 0 else 0
        return size if size < self.blocks else 0

    def evictable(self, page: int) -> bool:
        """Whether nothing on a page is pinned."""
        return not self._pages[page].pinned

    def find(self, size: int, *, pinned: bool) -> tuple[int, int] | None:
        """Free blocks, so many: their page, and which is the first. They are on a page where something is pinned if
        there is such a one, or if `pinned` asks for that, and on one with few free blocks."""
        fits = [
            (held, taken.bit_count(), taken)
            for held, taken in self._with_gaps
            if (held or not pinned) and _gap(taken, size, self.blocks) is not None
        ]
        if not fits:
            return None
        held, _, taken = max(fits)
        first = _gap(taken, size, self.blocks)
        return None if first is None else (next(iter(self._with_gaps[held, taken])), first)

    def open(self, page: int) -> None:
        """Cut a page."""
        self._pages[page] = _Page()
        self._change(page)

    def take(self, page: int, blocks: range) -> None:
        """Take free blocks of a page."""
        self._change(page, taken=bits_of(blocks))

    def give(self, page: int, blocks: range) -> bool:
        """Take blocks back. If no other is taken, the page is no longer one of these: whether that is so."""
        self._change(page, taken=bits_of(blocks))
        if self._pages[page].taken:
            return False
        self._forget(page, self._pages.pop(page))
        return True

    def pin(self, page: int) -> bool:
        """One more entry on a page is pinned; whether it is the only one."""
        self._change(page, pinned=1)
        return self._pages[page].pinned == 1

    def unpin(self, page: int) -> bool:
        """One less is; whether it was the only one."""
        self._change(page, pinned=-1)
        return not self._pages[page].pinned

    def state(self) -> Mapping[int, tuple[int, int]]:
        """Of each page the bits of the taken blocks, and how many entries are pinned."""
        return {page: (each.taken, each.pinned) for page, each in self._pages.items()}

    def _change(self, page: int, *, taken: int = 0, pinned: int = 0) -> None:
        state = self._pages[page]
        self._forget(page, state)
        state.taken ^= taken
        state.pinned += pinned
        if state.taken != (1 << self.blocks) - 1:
            self._with_gaps.setdefault((state.pinned > 0, state.taken), {})[page] = None

    def _forget(self, page: int, state: _Page) -> None:
        alike = self._with_gaps.get((state.pinned > 0, state.taken), {})
        alike.pop(page, None)
        if not alike:
            self._with_gaps.pop((state.pinned > 0, state.taken), None)


def bits_of(blocks: range) -> int:
    """A bit for each of some blocks side by side."""
    return ((1 << len(blocks)) - 1) << blocks.start


@lru_cache(maxsize=4096)
def _gap(taken: int, size: int, blocks: int) -> int | None:
    """The first of `size` free blocks."""
    starts = range(0, blocks, size)
    return next((first for first in starts if not taken & bits_of(range(first, first + size))), None)
