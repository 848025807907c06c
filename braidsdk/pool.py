"""The paged KV memory of one device, and which entries are resident in it.

Memory is one tensor [layers, 2, pages, kv_heads, page_size, head_dim] that grows by doubling up to its capacity; then
the least recently used entry that no running call pins makes room. Padding is zero where attention needs it.

Knows nothing about text, files or composition modes.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import psutil
import torch
from torch import Tensor

from braidsdk.errors import PoolFullError
from braidsdk.kernels.paging import PagedSegment
from braidsdk.models.base import Model
from braidsdk.store.keys import EntryKey
from braidsdk.types import LEVEL_QUERY

_log = logging.getLogger(__name__)

PAGE_SIZE = {"cpu": 128, "cuda": 64}
"""Tokens per page, by device: by measurement what its attention reads fastest."""


@dataclass(frozen=True)
class Resident:
    """A KV entry in the pool.

    Attributes:
        key: what it is the cache of.
        pages: its page ids, int64 [pages], on the CPU.
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
        initial_bytes: int = 0,
        page_size: int | None = None,
        zero_padding: bool = True,
    ) -> None:
        """Args:
        layers, kv_heads, head_dim: geometry of the model's cache.
        dtype, device: of the memory.
        capacity_bytes: how far it may grow.
        initial_bytes: what it takes from the start.
        page_size: tokens per page; None is what suits the device.
        zero_padding: whether slots without tokens must be zero: torch's attention multiplies them by zero, kernels that
            leave them out spare a pool the writing.
        """
        self.page_size = page_size = page_size or PAGE_SIZE[device.type]
        self.page_bytes = layers * 2 * kv_heads * page_size * head_dim * dtype.itemsize
        self.capacity_pages = capacity_bytes // self.page_bytes
        with torch.inference_mode(False):  # written in both modes, also by callers who open us inside one
            self.kv = torch.empty(layers, 2, 0, kv_heads, page_size, head_dim, dtype=dtype, device=device)
        self.zero_padding = zero_padding
        self._free: list[int] = []
        self._entries: OrderedDict[str, Resident] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._doomed: dict[str, list[Resident]] = {}
        self._grow(min(initial_bytes, capacity_bytes) // self.page_bytes)
        self.kv.zero_()  # touched now, so that the first question does not pay for it

    @classmethod
    def for_model(cls, model: Model, capacity_bytes: int) -> Self:
        """The pool of a model's device. On a GPU it takes its capacity from the start: growing would copy, and move
        what CUDA graphs read. Elsewhere it starts with room for one full window, or `INITIAL_BYTES` of it."""
        config = model.config
        token_bytes = config.layers * 2 * config.kv_heads * config.head_dim * model.dtype.itemsize
        window_bytes = min(config.window * token_bytes, INITIAL_BYTES)
        return cls(
            layers=config.layers,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=model.dtype,
            device=model.device,
            capacity_bytes=capacity_bytes,
            initial_bytes=capacity_bytes if model.device.type == "cuda" else window_bytes,
            zero_padding=model.paths.attention == "torch",
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that are not free."""
        return (self.kv.shape[2] - len(self._free)) * self.page_bytes

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

    def check_capacity(self, keys: Sequence[EntryKey], tail_tokens: int = 0) -> None:
        """Raise, before anything is loaded or computed, if these entries and a tail could never be here together.

        Raises:
            PoolFullError: they need more pages than the pool may ever have.
        """
        unique = {key.digest: len(key.token_ids) for key in keys}
        self.check_fits([*unique.values(), tail_tokens])

    def check_fits(self, token_counts: Sequence[int]) -> None:
        """`check_capacity` for entries of so many tokens."""
        needed = sum(map(self.pages_for, token_counts))
        if needed > self.capacity_pages:
            raise PoolFullError(
                f"The context and its answer need {needed * self.page_bytes / 1e6:,.1f} MB of KV memory; the pool's "
                f"limit is {self.capacity_pages * self.page_bytes / 1e6:,.1f} MB. Compose fewer chunks, lower "
                "max_new_tokens, or open the Braid with a larger pool_bytes."
            )

    def allocate(self, tokens: int, *, zeroed: bool = True) -> Tensor:
        """Take pages for `tokens` tokens; not zeroed where the caller writes every byte, or padding need not be zero.

        Returns:
            Page ids, int64 [pages], on the CPU.

        Raises:
            PoolFullError: they do not fit beside what running calls hold.
        """
        wanted = self.pages_for(tokens)
        while len(self._free) < wanted and (self._evict_old_turn() or self._grow(wanted) or self._evict()):
            pass
        if len(self._free) < wanted:
            raise PoolFullError(
                f"{tokens:,} tokens need {wanted * self.page_bytes / 1e6:,.1f} MB of KV memory; of "
                f"{self.capacity_pages * self.page_bytes / 1e6:,.1f} MB all but "
                f"{len(self._free) * self.page_bytes / 1e6:,.1f} MB is held by running calls. Compose fewer chunks, or "
                "finish other answers first."
            )
        ids = [self._free.pop() for _ in range(wanted)]
        if zeroed and self.zero_padding:
            for start, stop in _runs(ids):
                self.kv[:, :, start:stop] = 0
        return torch.tensor(ids, dtype=torch.int64)

    def reserve(self, pages: int) -> None:
        """Grow once for so many pages, as far as the capacity goes, instead of bit by bit."""
        if pages > len(self._free):
            self._grow(pages - len(self._free))

    def memory_of(self, pages: Tensor) -> list[list[memoryview]]:
        """For each layer the bytes of these pages, all keys before all values, in few pieces.

        For a pool on the CPU. They are good until it grows.
        """
        part = self.kv.stride(2) * self.kv.itemsize  # of one page: its keys, or its values, in one layer
        memory = self.kv.view(-1).view(torch.uint8).numpy().data
        runs = [(start * part, stop * part) for start, stop in _runs(pages.tolist())]
        halves = [half * self.kv.shape[2] * part for half in range(2 * len(self.kv))]
        pieces = [[memory[at + start : at + stop] for start, stop in runs] for at in halves]
        return [keys + values for keys, values in zip(pieces[::2], pieces[1::2], strict=True)]

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

    def drop_chunks(self, chunk_ids: Set[str]) -> None:
        """Forget every entry of these chunks, and every entry that was computed with sight of one."""
        self.drop([d for d, e in self._entries.items() if not chunk_ids.isdisjoint((e.key.chunk_id, *e.key.after))])

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

    def _evict(self, level: int | None = None) -> bool:
        """Drop the least recently used entry that no call pins, of that level if given; whether there was one."""
        for digest, entry in self._entries.items():
            if digest not in self._pins and level in (None, entry.key.level):
                _log.debug("evicted an entry of %d tokens", entry.tokens)
                self.drop([digest])
                return True
        return False

    def _evict_old_turn(self) -> bool:
        """Drop a past turn, unless they are few: most conversations never go on, and should not make memory grow."""
        turns = sum(entry.key.level == LEVEL_QUERY for entry in self._entries.values())
        return turns > KEPT_TURNS and self._evict(LEVEL_QUERY)

    def _grow(self, wanted: int) -> bool:
        have = self.kv.shape[2]
        size = min(self.capacity_pages, max(2 * have, have + wanted))
        if size <= have:
            return False
        shape = (*self.kv.shape[:2], size, *self.kv.shape[3:])
        old = self.kv
        if len(self._free) == have:  # nothing is in use: nothing to copy, and no need to hold both
            old = self.kv = self.kv[:, :, :0].clone()
            self._free, have = [], 0  # so that all holds if there is no memory
        try:
            with torch.inference_mode(False):
                grown = self.kv.new_empty(shape)  # allocate zeroes pages
        except RuntimeError as error:  # how torch says that there is no memory
            raise PoolFullError(
                f"The pool of KV memory can't take {size * self.page_bytes / 1e6:,.1f} MB: so much is not free on "
                f"{self.kv.device}. Open the Braid with a smaller pool_bytes, or free memory."
            ) from error
        if old.shape[2]:
            for start, stop in _runs(sorted(set(range(have)).difference(self._free))):
                grown[:, :, start:stop] = old[:, :, start:stop]
        self.kv = grown
        self._free = [*range(size - 1, have - 1, -1), *self._free]
        return True


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive page ids as the first and one past the last of each run."""
    cuts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1), len(ids)]
    return [(ids[start], ids[stop - 1] + 1) for start, stop in pairwise(cuts) if stop > start]


KEPT_TURNS = 32
"""Past turns of conversations that stay resident before memory grows for others."""

INITIAL_BYTES = 256 * 2**20
"""What a pool takes from the start, at most."""


def default_capacity_bytes(device: torch.device) -> int:
    """Half of the memory that is free on the device now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free to us alone
        return (int(torch.cuda.mem_get_info(device)[0]) + cached) // 2
    return int(psutil.virtual_memory().available) // 2
