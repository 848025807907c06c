"""What one running call holds of the pool: pins on the entries that it reads, and the pages of its tail."""

from collections.abc import Sequence
from contextlib import ExitStack

from braidsdk.pool import Pool, Resident
from braidsdk.store.keys import EntryKey


class Lease:
    """Taken at admission, closed once. Every method changes the pool: call them with the engine's lock held.

    Attributes:
        pages: pages of the tail, int64 [pages].
    """

    def __init__(self, pool: Pool, keys: Sequence[EntryKey], tail_tokens: int) -> None:
        """Pin entries and reserve a tail, before anything is loaded or computed.

        Args:
            pool: where.
            keys: of the entries that the call reads.
            tail_tokens: question and answer, at most.

        Raises:
            PoolFullError: the tail does not fit beside what running calls hold.
        """
        self._pool = pool
        pool.check_capacity(keys, tail_tokens)
        with ExitStack() as held:
            held.enter_context(pool.pinned(keys))
            self.pages = pool.allocate(tail_tokens)
            self._pins = held.pop_all()

    def adopt(self, key: EntryKey) -> None:
        """Make the tail's first tokens a resident entry of their own, so that a later call can read them.

        Args:
            key: names exactly those tokens; all of them are computed.
        """
        if self._pool.get(key.digest):
            return  # the same turn was taken before; these pages go back
        pages = self._pool.pages_for(len(key.token_ids))
        if self._pool.zero_padding:  # also where tokens were cut off
            filled = len(key.token_ids) - (pages - 1) * self._pool.page_size
            self._pool.kv[:, :, self.pages[pages - 1], :, filled:] = 0
        self._pool.adopt(Resident(key, self.pages[:pages], stored=False))
        self.pages = self.pages[pages:]

    def close(self) -> None:
        """Unpin and give back what no entry owns. Again is harmless."""
        self._pins.close()
        self._pool.release(self.pages)
        self.pages = self.pages[:0]
