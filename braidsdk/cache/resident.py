"""An entry in the pool: which of its memory is its own."""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from braidsdk.kernels.paging import BLOCK, PagedSegment
from braidsdk.store.keys import EntryKey


class State(StrEnum):
    """The state of an entry. It goes LOADING -> READY -> DROPPED, or LOADING -> DROPPED."""

    LOADING = "loading"
    """Its pages are taken, but not all of its keys and values are there yet."""
    READY = "ready"
    DROPPED = "dropped"
    """It can't be found any more. Its pages are freed with the last pin."""


@dataclass(eq=False)
class Resident:
    """A KV entry in the pool.

    Attributes:
        key: names the entry.
        pages: its page ids, int64 [pages], on the CPU.
        blocks: which blocks of its page are its own, if it shares that page; None if it shares none.
        stored: whether the store holds it too, or it is being written.
        state: see `State`.
    """

    key: EntryKey
    pages: Tensor
    blocks: range | None = None
    stored: bool = False
    state: State = State.LOADING

    @property
    def tokens(self) -> int:
        return len(self.key.token_ids)

    @property
    def offset(self) -> int:
        """Where on its first page token 0 is."""
        return BLOCK * self.blocks.start if self.blocks else 0

    @property
    def places(self) -> slice:
        """What of its pages is its own."""
        return slice(BLOCK * self.blocks.start, BLOCK * self.blocks.stop) if self.blocks else slice(None)

    @property
    def page(self) -> int:
        """Its first page."""
        return int(self.pages[0])

    def at(self, origin: int) -> PagedSegment:
        """The whole entry, with its token 0 at absolute position `origin`."""
        return PagedSegment(self.pages, self.offset, self.offset + self.tokens, origin, offset=self.offset)
