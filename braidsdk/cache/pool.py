"""The paged KV memory of one device, and which entries are resident in it.

Memory is one tensor [layers, 2, pages, kv_heads, page_size, head_dim]. It takes its capacity at once. On a GPU, growing
would copy it, and move what CUDA graphs read. On a CPU the system gives memory only to pages that are written to. When
no page is free, the least recently used entry without a pin is evicted, overlays before all others. Entries that are
smaller than half a page share pages: such a page is free once nothing is left on it.

Padding is zero if attention needs that. Only the engine's thread changes a pool.

Knows nothing about text, files or composition modes.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence, Set
from itertools import chain
from typing import Self

import psutil
import torch
from torch import Tensor

from braidsdk.cache.free import FreePages, runs_of
from braidsdk.cache.resident import Resident, State
from braidsdk.cache.shared import SharedPages, bits_of
from braidsdk.errors import PoolFullError
from braidsdk.models.base import Model
from braidsdk.store.keys import EntryKey
from braidsdk.types import LEVEL_OVERLAY, LEVEL_QUERY

_log = logging.getLogger(__name__)

PAGE_SIZE = {"cpu": 128, "cuda": 64}
"""Tokens per page, by device. Measurements showed that its attention reads pages of this size fastest."""

KEPT_TURNS = 32
"""This many past turns of conversations stay resident. Most conversations never go on."""

TOUCHED_BYTES = 256 * 2**20
"""A pool on a CPU writes to this many bytes when it is made, so that the first question does not pay for it."""


_NONE = torch.empty(0, dtype=torch.int64)


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
        page_size: int | None = None,
        zero_padding: bool = True,
    ) -> None:
        """Take the memory.

        Args:
            layers, kv_heads, head_dim: geometry of the model's cache.
            dtype, device: dtype and device of the memory.
            capacity_bytes: how much memory to take, rounded down to whole pages.
            page_size: tokens per page; None takes what suits the device.
            zero_padding: whether slots without tokens must be zero. torch's attention multiplies them by zero; kernels
                that skip them do not need it.

        Raises:
            PoolFullError: the device does not have that much memory.
        """
        self.page_size = page_size = page_size or PAGE_SIZE[device.type]
        self.page_bytes = layers * 2 * kv_heads * page_size * head_dim * dtype.itemsize
        self.capacity_pages = capacity_bytes // self.page_bytes
        shape = (layers, 2, self.capacity_pages, kv_heads, page_size, head_dim)
        try:
            with torch.inference_mode(False):  # it is written in both modes, and callers may open us inside one
                self.kv = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # how torch says that there is no memory
            raise PoolFullError(
                f"pool_bytes must be at most the memory that is free on {device}; got {capacity_bytes / 1e6:,.1f} MB. "
                "Open the Braid with a smaller pool_bytes, or free memory."
            ) from error
        touched = self.capacity_pages if device.type == "cuda" else TOUCHED_BYTES // self.page_bytes
        self.kv[:, :, :touched] = 0
        self.zero_padding = zero_padding
        self._free = FreePages(self.capacity_pages)
        self._shared = SharedPages(page_size)
        self._entries: OrderedDict[EntryKey, Resident] = OrderedDict()
        self._turns: OrderedDict[EntryKey, Resident] = OrderedDict()
        self._overlays: OrderedDict[EntryKey, Resident] = OrderedDict()
        self._pins: Counter[Resident] = Counter()
        self._evictable = 0  # pages on which nothing is pinned

    @classmethod
    def for_model(cls, model: Model, capacity_bytes: int) -> Self:
        """A pool for a model, on its device."""
        return cls(
            layers=model.config.layers,
            kv_heads=model.config.kv_heads,
            head_dim=model.config.head_dim,
            dtype=model.dtype,
            device=model.device,
            capacity_bytes=capacity_bytes,
            zero_padding=model.backends.attention == "torch",
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that are not free."""
        return (self.capacity_pages - len(self._free)) * self.page_bytes

    @property
    def room(self) -> int:
        """Pages that can be taken now: free ones, and those on which nothing is pinned."""
        return len(self._free) + self._evictable

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill."""
        return -(-tokens // self.page_size)

    def needed(self, entries: Iterable[int], own: Iterable[int] = ()) -> int:
        """Pages that entries take with so many tokens each, and a request beside them for its own tokens."""
        counts = list(entries)
        blocks = list(map(self._shared.blocks_for, counts))
        pages = sum(self.pages_for(count) for count, some in zip(counts, blocks, strict=True) if not some)
        return pages - (-sum(blocks) // self._shared.blocks) + sum(map(self.pages_for, own))

    def bytes_for(self, tokens: int) -> int:
        """Bytes that an entry of `tokens` tokens takes, including the padding to whole pages or blocks."""
        blocks = self._shared.blocks_for(tokens) or self.pages_for(tokens) * self._shared.blocks
        return blocks * self.page_bytes // self._shared.blocks

    def find(self, key: EntryKey) -> Resident | None:
        """The entry of this key, loading or ready. Finding it does not count as a use. Any thread may ask.

        Whole keys are compared: xxh3 does not resist collisions, so two keys may have one digest."""
        return self._entries.get(key)

    def check_fits(self, entries: Iterable[int], own: Iterable[int] = ()) -> None:
        """Check, before anything is loaded or computed, that what `needed` counts fits together.

        Raises:
            PoolFullError: they need more pages than the pool has, so they never fit.
        """
        needed = self.needed(entries, own)
        if needed > self.capacity_pages:
            raise PoolFullError(
                f"The context and its answer must fit into {self.capacity_pages * self.page_bytes / 1e6:,.1f} MB of KV "
                f"memory, the pool's limit; they need {needed * self.page_bytes / 1e6:,.1f} MB. Compose fewer chunks, "
                "lower max_new_tokens, or open the Braid with a larger pool_bytes."
            )

    def take(self, tokens: int) -> Tensor:
        """Take whole pages for `tokens` tokens. Old data may lie on them; see `clear`.

        Returns:
            Page ids, int64 [pages], on the CPU.

        Raises:
            PoolFullError: they do not fit beside the pinned entries.
        """
        wanted = self.pages_for(tokens)
        if not wanted:
            return _NONE
        self._check_room(tokens, wanted)
        while len(self._free) < wanted:
            self._evict_one(whole_pages=True)
        return torch.tensor(self._free.take(wanted), dtype=torch.int64)

    def place(self, keys: Sequence[EntryKey], beside: int = 0) -> dict[EntryKey, Resident]:
        """Take room for entries and make them resident, loading and pinned. Old data may lie there; see `clear_entry`.

        Small ones go where something is pinned already, so that few pages become pinned; then onto any shared page, as
        long as enough others stay for what comes after; then onto a page of which all is evicted. So whatever is
        pinned elsewhere, and however free blocks lie, no more pages are used up than `needed` says.

        Args:
            keys: none of them is resident.
            beside: how many pages will be taken after this.

        Raises:
            PoolFullError: they do not fit beside the pinned entries.
        """
        counts = [len(key.token_ids) for key in keys]
        sizes = list(map(self._shared.blocks_for, counts))
        needed, blocks = self.needed(counts) + beside, sum(sizes)
        self._check_room(sum(counts), needed)
        pages = needed + -blocks // self._shared.blocks  # whole ones; with blocks, of what comes after the next entry
        for key, count, size in zip(keys, counts, sizes, strict=True):
            if size:
                blocks -= size
                scarce = self.room <= pages - (-blocks // self._shared.blocks)
                page, first = self._take_blocks(size, scarce=scarce)
                entry = Resident(key, torch.tensor([page]), range(first, first + size))
            else:
                entry = Resident(key, self.take(count))
                pages -= len(entry.pages)
            self.pin(self.add(entry))
        return {key: self._entries[key] for key in keys}

    def _take_blocks(self, size: int, *, scarce: bool) -> tuple[int, int]:
        """Take free blocks, so many, of a shared page: the page, and the first. If pages are scarce, of one where
        something is pinned, or of one where nothing else is left."""
        while (found := self._shared.find(size, pinned=scarce)) is None:
            if len(self._free):
                (page,) = self._free.take(1)
                self._shared.open(page)
                self._evictable += 1
                found = page, 0
                break
            self._evict_one(whole_pages=scarce)
        page, first = found
        self._shared.take(page, range(first, first + size))
        return page, first

    def _check_room(self, tokens: int, wanted: int) -> None:
        if wanted > self.room:
            raise PoolFullError(
                f"{tokens:,} tokens must fit into the {self.room * self.page_bytes / 1e6:,.1f} MB that running calls "
                f"leave of {self.capacity_pages * self.page_bytes / 1e6:,.1f} MB of KV memory; they need "
                f"{wanted * self.page_bytes / 1e6:,.1f} MB. Try again when those calls have ended, or open the Braid "
                "with a larger pool_bytes."
            )

    def clear(self, pages: Tensor) -> None:
        """Set pages to zero that will not be filled to the last slot, if attention needs that."""
        if self.zero_padding:
            self.blank(pages)

    def clear_entry(self, entry: Resident) -> None:
        """Set what an entry has of its pages to zero, before it is computed, if attention needs that."""
        if entry.blocks is None:
            self.clear(entry.pages)
        elif self.zero_padding:
            self.kv[:, :, entry.pages[0], :, entry.places] = 0

    def blank(self, pages: Tensor) -> None:
        """Set pages to zero."""
        for start, stop in runs_of(pages.tolist()):
            self.kv[:, :, start:stop] = 0

    def give_back(self, pages: Tensor) -> None:
        """Free pages that belong to no entry."""
        if len(pages):
            self._free.give(pages.tolist())

    def clear_padding(self, entry: Resident) -> None:
        """Set what stands behind an entry's last token to zero, if attention needs that."""
        if self.zero_padding:
            filled = entry.offset + entry.tokens - (len(entry.pages) - 1) * self.page_size
            self.kv[:, :, entry.pages[-1], :, filled : entry.places.stop] = 0

    def add(self, entry: Resident) -> Resident:
        """Make an entry resident, loading or ready. Only the latest `KEPT_TURNS` past turns stay."""
        self._entries[entry.key] = entry
        if entry.blocks is None:
            self._evictable += len(entry.pages)
        if entry.key.level == LEVEL_QUERY:
            self._turns[entry.key] = entry
            if len(self._turns) > KEPT_TURNS:
                self._evict(turn for turn in self._turns.values() if turn is not entry)
        elif entry.key.level == LEVEL_OVERLAY:
            self._overlays[entry.key] = entry
        return entry

    def pin(self, entry: Resident) -> None:
        """Keep an entry until it is unpinned as often as it was pinned. It is now the most recently used one."""
        for entries in (self._entries, self._turns, self._overlays):
            if entry.key in entries:
                entries.move_to_end(entry.key)
        if entry not in self._pins and entry.state is not State.DROPPED:
            if entry.blocks is None:
                self._evictable -= len(entry.pages)
            else:
                self._evictable -= self._shared.pin(entry.page)
        self._pins[entry] += 1

    def unpin(self, entry: Resident) -> None:
        """Undo a `pin`."""
        self._pins[entry] -= 1
        if not self._pins[entry]:
            del self._pins[entry]
            if entry.blocks is None:
                self._evictable += len(entry.pages)
            else:
                self._evictable += self._shared.unpin(entry.page)
            if entry.state is State.DROPPED:
                self._free_entry(entry)

    def drop(self, entry: Resident) -> None:
        """Forget an entry and free its pages, or, if it is pinned, free them with the last pin. Safe to call twice."""
        if entry.state is State.DROPPED:
            return
        entry.state = State.DROPPED
        del self._entries[entry.key]
        self._turns.pop(entry.key, None)
        self._overlays.pop(entry.key, None)
        if entry not in self._pins:
            self._free_entry(entry)

    def drop_chunks(self, chunk_ids: Set[str]) -> list[Resident]:
        """Drop every entry of these chunks, and every entry that was computed after one of them. Returns them."""
        gone = [e for e in self._entries.values() if not chunk_ids.isdisjoint((e.key.chunk_id, *e.key.after))]
        for entry in gone:
            self.drop(entry)
        return gone

    def pins(self, entry: Resident) -> int:
        """How often an entry is pinned."""
        return self._pins[entry]

    def close(self) -> None:
        """Free the memory and forget every entry. Callers' threads may hold the pool a little longer, for its numbers:
        nothing that they then let go of is a tensor."""
        self.kv = _NONE
        for each in (self._entries, self._turns, self._overlays, self._pins):
            each.clear()

    def integrity(self, held: Iterable[Tensor] = ()) -> None:
        """Check that each page is free, or belongs to one entry or one request, that each block of a shared page does
        too, and that pins and counts agree.

        Args:
            held: pages that requests hold beside entries.

        Raises:
            RuntimeError: a check failed; the message says which.
        """
        dropped = [entry for entry in self._pins if entry.state is State.DROPPED]
        entries = [*self._entries.values(), *dropped]
        sharing = [(each.page, each) for each in entries if each.blocks]
        owned = [*(entry.pages for entry in entries if not entry.blocks), *held]
        if sorted(
            [*self._free, *{page for page, _ in sharing}, *(page for pages in owned for page in pages.tolist())]
        ) != list(range(self.capacity_pages)):
            raise RuntimeError("pool: a page is lost, or has two owners")
        blocks, pinned = Counter[int](), Counter[int]()
        for page, entry in sharing:
            blocks[page] += bits_of(entry.blocks or range(0))
            pinned[page] += entry in self._pins
        if self._shared.state() != {page: (bits, pinned[page]) for page, bits in blocks.items()}:
            raise RuntimeError("pool: a block of a page is lost, or has two owners, or pins on a page are miscounted")
        if any(count < 1 for count in self._pins.values()):
            raise RuntimeError("pool: an entry is unpinned more often than it was pinned")
        unpinned = [each for each in self._entries.values() if each not in self._pins and not each.blocks]
        if self._evictable != sum(len(e.pages) for e in unpinned) + sum(not pinned[page] for page in blocks):
            raise RuntimeError("pool: the count of pages that can be evicted is wrong")
        if any(entry.state is State.LOADING and entry not in self._pins for entry in self._entries.values()):
            raise RuntimeError("pool: an entry is loading and has no pin")

    def _free_entry(self, entry: Resident) -> None:
        """Free what an entry has of its pages. It has no pin."""
        freed = self._shared.give(entry.page, entry.blocks) if entry.blocks else len(entry.pages)
        self._evictable -= freed
        if freed:
            self.give_back(entry.pages)

    def _evict_one(self, *, whole_pages: bool) -> None:
        """Evict for room that there is."""
        if not self._evict(chain(self._overlays.values(), self._entries.values()), whole_pages=whole_pages):
            raise RuntimeError("pool: there should be room, and nothing can be evicted")

    def _evict(self, entries: Iterable[Resident], *, whole_pages: bool = False) -> bool:
        """Drop the first of these entries that has no pin, and, for `whole_pages`, that no pinned entry shares a page
        with; whether there is one."""
        for entry in entries:
            alone = not whole_pages or entry.blocks is None or self._shared.evictable(entry.page)
            if entry not in self._pins and alone:
                _log.debug("evicted an entry of %d tokens", entry.tokens)
                self.drop(entry)
                return True
        return False


def default_capacity_bytes(device: torch.device) -> int:
    """Half of the memory that is free on the device now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free to us alone
        return (int(torch.cuda.mem_get_info(device)[0]) + cached) // 2
    return int(psutil.virtual_memory().available) // 2
