"""The paged KV memory of one device, and which entries are resident in it.

Memory is one tensor [layers, 2, pages, kv_heads, page_size, head_dim] that grows by doubling up to its capacity; then
the least recently used entry that no running call pins makes room. Padding is zero.

Knows nothing about text, files or composition modes.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from braidsdk.errors import PoolFullError
from braidsdk.kernels.paging import PagedSegment
from braidsdk.store.keys import EntryKey

PAGE_SIZE = 64
"""Tokens per page."""


@dataclass(frozen=True)
class Resident:
    """A KV entry in the pool.

    Attributes:
        key: what it is the cache of.
        pages: its page ids, int64 [pages].
        stored: whether the store holds it too.
    """

    key: EntryKey
    pages: Tensor
    stored: bool

    @property
    def tokens(self) -> int:
        return len(self.key.token_ids)

    def at(self, origin: int) -> PagedSegment:
        """The whole entry, its token 0 at absolute position `origin`."""
        return PagedSegment(self.pages, 0, self.tokens, origin)


class Pool:
    """Pages, and the entries that lie in them."""

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity_bytes: int,
        page_size: int = PAGE_SIZE,
    ) -> None:
        """Args:
        layers, kv_heads, head_dim: geometry of the model's cache.
        dtype, device: of the memory.
        capacity_bytes: how far it may grow.
        page_size: tokens per page.
        """
        self.page_size = page_size
        self.page_bytes = layers * 2 * kv_heads * page_size * head_dim * dtype.itemsize
        self.capacity_pages = capacity_bytes // self.page_bytes
        with torch.inference_mode(False):  # written in both modes, also by callers who open us inside one
            self.kv = torch.zeros(layers, 2, 0, kv_heads, page_size, head_dim, dtype=dtype, device=device)
        self._free: list[int] = []
        self._entries: OrderedDict[str, Resident] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._doomed: dict[str, list[Resident]] = {}

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill."""
        return -(-tokens // self.page_size)

    def bytes_for(self, tokens: int) -> int:
        """Bytes that `tokens` tokens take, padding to whole pages included."""
        return self.pages_for(tokens) * self.page_bytes

    def get(self, digest: str) -> Resident | None:
        """The resident entry of that key digest, now the most recently used."""
        entry = self._entries.get(digest)
        if entry:
            self._entries.move_to_end(digest)
        return entry

    def peek(self, digest: str) -> Resident | None:
        """The resident entry of that key digest; does not count as a use."""
        return self._entries.get(digest)

    def allocate(self, tokens: int) -> Tensor:
        """Take zeroed pages for `tokens` tokens: page ids, int64 [pages].

        Raises:
            PoolFullError: they do not fit beside what running calls hold.
        """
        wanted = self.pages_for(tokens)
        while len(self._free) < wanted and (self._grow(wanted) or self._evict()):
            pass
        if len(self._free) < wanted:
            raise PoolFullError(
                f"{tokens:,} tokens need {wanted * self.page_bytes / 1e6:,.1f} MB of KV memory; of "
                f"{self.capacity_pages * self.page_bytes / 1e6:,.1f} MB all but "
                f"{len(self._free) * self.page_bytes / 1e6:,.1f} MB is held by running calls. Compose fewer chunks, or "
                "finish other answers first."
            )
        pages = torch.tensor([self._free.pop() for _ in range(wanted)], dtype=torch.int64, device=self.kv.device)
        self.kv[:, :, pages] = 0
        return pages

    def release(self, pages: Tensor) -> None:
        """Give back pages that belong to no entry."""
        self._free += reversed(pages.tolist())

    def adopt(self, entry: Resident) -> None:
        """Make an entry resident, or replace what is known of it."""
        self._entries[entry.key.digest] = entry

    def drop(self, digests: Iterable[str]) -> None:
        """Forget entries and free their pages, those that a running call pins once it ends."""
        for digest in digests:
            if entry := self._entries.pop(digest, None):
                if digest in self._pins:
                    self._doomed.setdefault(digest, []).append(entry)
                else:
                    self.release(entry.pages)

    def drop_chunk(self, chunk_id: str) -> None:
        """Forget every entry of a chunk, and every entry that was computed with sight of it."""
        self.drop([d for d, e in self._entries.items() if chunk_id == e.key.chunk_id or chunk_id in e.key.after])

    @contextmanager
    def pinned(self, keys: Sequence[EntryKey]) -> Iterator[None]:
        """While this runs, entries of these keys do not make room for others, resident already or not yet."""
        for key in keys:
            self._pins[key.digest] = self._pins.get(key.digest, 0) + 1
        try:
            yield
        finally:
            for key in keys:
                self._pins[key.digest] -= 1
                if not self._pins[key.digest]:
                    del self._pins[key.digest]
                    for doomed in self._doomed.pop(key.digest, ()):
                        self.release(doomed.pages)

    def _evict(self) -> bool:
        for digest in self._entries:
            if digest not in self._pins:
                self.drop([digest])
                return True
        return False

    def _grow(self, wanted: int) -> bool:
        have = self.kv.shape[2]
        size = min(self.capacity_pages, max(2 * have, have + wanted, 16))
        if size <= have:
            return False
        with torch.inference_mode(False):
            grown = self.kv.new_zeros(*self.kv.shape[:2], size, *self.kv.shape[3:])
        grown[:, :, :have] = self.kv
        self.kv = grown
        self._free = [*range(size - 1, have - 1, -1), *self._free]
        return True


def default_capacity_bytes(device: torch.device) -> int:
    """Half of the memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return int(psutil.virtual_memory().available) // 2
