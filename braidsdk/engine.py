"""Model, pool and store together: makes the entries of a composition resident.

One read of the store for what the pool lacks, one pass of the model for what the store lacks, at most one write.
"""

import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from time import perf_counter

import torch
import transformers
from torch import Tensor

from braidsdk.compose import Composition
from braidsdk.decoding import Decoder, EagerDecoder
from braidsdk.encode import Run, compute
from braidsdk.errors import BraidError, ClosedError, StoreError, UnknownChunkError
from braidsdk.fair_lock import FairLock
from braidsdk.graphs import GraphDecoder, Graphs, runs_on_graphs
from braidsdk.history import SpokenTurns
from braidsdk.lease import Lease
from braidsdk.models.base import Model
from braidsdk.pool import Pool, Resident
from braidsdk.rates import Rates
from braidsdk.store import ChunkStore, Entry, EntryKey, Hit, ModelIdentity, Place, Slab
from braidsdk.tokens import PromptLayout
from braidsdk.workers import Workers

NO_CODEC = "none"

HITS, MISSES = "hits", "misses"
"""Under which the store remembers the counts of all processes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Resident entries of a composition, and what it took to have them.

    Attributes:
        entries: one per segment, in order.
        computed_tokens: tokens whose entries were computed now; all others were cached.
        load_ms: time spent on reading the store.
        compute_ms: time spent on computing and writing what was missing.
    """

    entries: tuple[Resident, ...]
    computed_tokens: int
    load_ms: float
    compute_ms: float


class Engine:
    """What one open Braid holds.

    Several threads may share it: model and pool are used within `working`, one step of one call at a time.

    Attributes:
        calls: held by a call that runs to its end, so that such calls queue instead of competing for the pool. Streams
            hold pages between their steps, and don't take it.
        turns: the ids of answers given, for conversations that go on.
        rates: how fast this model was on this device.
        workers: threads that run an event loop's calls.
        hits, misses: entries that calls found, and that they had to compute.
    """

    def __init__(self, model: Model, layout: PromptLayout, store: ChunkStore, pool: Pool, namespace: str) -> None:
        self.model = model
        self.layout = layout
        self.store = store
        self.pool = pool
        self.namespace = namespace
        self.config = model.config
        self.calls = FairLock()
        self.turns = SpokenTurns()
        self._step = FairLock()
        self._returned: SimpleQueue[Lease] = SimpleQueue()
        self.identity = ModelIdentity(
            weights=model.fingerprint,
            tokenizer=layout.fingerprint,
            dtype=_name(model.dtype),
            codec=NO_CODEC,
            layers=model.config.layers,
            kv_heads=model.config.kv_heads,
            head_dim=model.config.head_dim,
            rope=model.config.rope,
        )
        prefix = f"rate:{self.identity.weights}:{self.identity.dtype}:{model.device}"
        self.rates = Rates(prefix, store.recall(Rates.keys(prefix)))
        self.workers = Workers()
        self.hits = self.misses = 0
        self._graphs = Graphs(model, pool) if runs_on_graphs(model) else None
        self._open = True

    def check_open(self) -> None:
        """Raises:
        ClosedError: `close` was called.
        """
        if not self._open:
            raise ClosedError("This Braid is closed. Open a new one; what it stored is still there.")

    def close(self) -> None:
        """Free the pool and close the store. Safe to call twice."""
        with self._step:
            if self._open:
                self._open = False
                self.workers.close()
                self._remember()
                self.store.close()
                del self.pool, self.model, self._graphs

    def _remember(self) -> None:
        """Leave counts and rates for later processes; what can't be written is only missed by statistics."""
        counts = {name: count for name, count in ((HITS, self.hits), (MISSES, self.misses)) if count}
        try:
            self.store.remember(self.rates.changed(), add=counts)
        except BraidError as error:
            _log.warning("counts and rates were not kept: %s", type(error).__name__)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Have model and pool to oneself for one step of a call. Threads are served in the order they came; one that
        is within must not ask again.

        Raises:
            ClosedError: `close` was called.
        """
        try:
            with self._step:
                self.check_open()
                self._close_returned()
                yield
        finally:
            self._settle()

    def decoder(self) -> Decoder:
        """One for requests that go on together. Call it within `working`."""
        if self._graphs:
            return GraphDecoder(self._graphs, self.model, self.pool)
        return EagerDecoder(self.model, self.pool)

    def warm_up(self, requests: int, report: Callable[[int, int], None]) -> None:
        """`Graphs.warm_up`, where the model runs on graphs."""
        with self.working():
            if self._graphs:
                self._graphs.warm_up(requests, report)

    def launches(self) -> dict[str, int]:
        """Kernels that each pass launches which was captured so far; empty where the model does not run on graphs."""
        with self.working():
            return self._graphs.launches() if self._graphs else {}

    def give_back(self, lease: Lease) -> None:
        """End a lease: now, or when the step that runs has ended. Never waits.

        So a generator may call it while it is garbage collected, in any thread and at any point, within a step too.
        """
        self._returned.put(lease)
        self._settle()

    def _settle(self) -> None:
        while not self._returned.empty() and self._step.try_acquire():
            try:
                self._close_returned()
            finally:
                self._step.release()

    def _close_returned(self) -> None:
        while not self._returned.empty():  # only the holder of `_step` takes from it
            self._returned.get_nowait().close()

    def keys(self, composition: Composition, known: Sequence[EntryKey] = ()) -> tuple[EntryKey, ...]:
        """The key of each segment's entry; `known`: those of the first segments, where the caller has them."""
        return composition.keys(self.identity, self.namespace, known)

    def locate(self, keys: Sequence[EntryKey]) -> list[Resident | Hit | None]:
        """Where each entry is, None: nowhere. Loads and computes none."""
        found = dict(zip(keys, self.store.look_up(keys), strict=True))
        return [self.pool.peek(key.digest) or found[key] for key in keys]

    def prepare(self, composition: Composition, keys: Sequence[EntryKey], *, counted: bool = True) -> Prepared:
        """Make every entry of a composition resident. Call it with the keys pinned.

        Args:
            composition: of which.
            keys: of its segments.
            counted: whether it counts in `hits` and `misses`.

        Raises:
            PoolFullError: they do not fit in the pool.
            UnknownChunkError: a chunk was deleted meanwhile, by this or another process.
            StoreError: what was computed can't be written.
        """
        started = perf_counter()
        self.pool.check_capacity(keys)
        self._check_chunks(composition)
        unique = {key.digest: key for key in keys}
        absent = [key for key in unique.values() if not self.pool.get(key.digest)]
        loaded_bytes = found_entries = 0
        if absent:
            found_entries, loaded_bytes = self._load(absent)
        loaded = perf_counter()
        missing = len(absent) - found_entries
        if counted:
            self.hits += len(unique) - missing
            self.misses += missing
        computed = self._compute_missing(composition, keys)
        kept = self._keep(composition, keys)
        finished = perf_counter()
        if loaded_bytes:
            self.rates.add("load", loaded_bytes, loaded - started)
            _log.info("loaded %d entries, %d bytes in %.1f ms", found_entries, loaded_bytes, (loaded - started) * 1e3)
        if computed:
            if kept or self.model.device.type == "cpu":  # a GPU is only waited for when what it computed is read
                self.rates.add("compute", computed, finished - loaded)
            _log.info("computed %d entries, %d tokens in %.1f ms", missing, computed, (finished - loaded) * 1e3)
        return Prepared(
            entries=tuple(self._resident(key) for key in keys),
            computed_tokens=computed,
            load_ms=(loaded - started) * 1e3,
            compute_ms=(finished - loaded) * 1e3,
        )

    def disown(self, keys: Sequence[EntryKey]) -> None:
        """Take note that the store does not hold these entries, resident or not, so that `prepare` writes them."""
        for key in keys:
            if entry := self.pool.peek(key.digest):
                self.pool.adopt(replace(entry, stored=False))

    def _check_chunks(self, composition: Composition) -> None:
        """Refuse a composition with a deleted chunk, and forget what was computed with sight of it."""
        labels = {segment.chunk.id: segment.label for segment in composition.segments if segment.chunk}
        gone = labels.keys() - self.store.known_chunks(self.namespace, labels)
        if gone:
            self.pool.drop_chunks(gone)
            names = ", ".join(repr(labels[chunk_id]) for chunk_id in sorted(gone))
            raise UnknownChunkError(f"Deleted meanwhile: {names}. Register it again, or compose without it.")

    def _compute_missing(self, composition: Composition, keys: Sequence[EntryKey]) -> int:
        """Compute what neither pool nor store holds; returns the number of tokens."""
        pages: dict[str, Tensor] = {}
        runs = []
        try:
            for segment, key in zip(composition.segments, keys, strict=True):
                if key.digest in pages or self.pool.get(key.digest):
                    continue
                context, origin = [], 0
                for index in segment.after:
                    before = keys[index]
                    entry = self.pool.get(before.digest) or Resident(before, pages[before.digest], stored=False)
                    context.append(entry.at(origin))
                    origin += entry.tokens
                pages[key.digest] = self.pool.allocate(len(key.token_ids))
                runs.append(Run(key.token_ids, tuple(context), pages[key.digest], 0, origin))
            compute(self.model, self.pool, runs)
        except BaseException:
            for unused in pages.values():
                self.pool.release(unused)
            raise
        for key in {key.digest: key for key in keys if key.digest in pages}.values():
            self.pool.adopt(Resident(key, pages[key.digest], stored=False))
        return sum(len(run.token_ids) for run in runs)

    def _keep(self, composition: Composition, keys: Sequence[EntryKey]) -> int:
        """Write to the store what the composition keeps and the store does not hold; returns how many entries."""
        wanted = {key.digest: key for segment, key in zip(composition.segments, keys, strict=True) if segment.keep}
        entries = [entry for key in wanted.values() if not (entry := self._resident(key)).stored]
        if entries:
            try:
                self.store.publish([(entry.key, self._slabs(entry), self._provenance()) for entry in entries])
            except StoreError as error:
                raise type(error)(f"{error} To answer without storing, compose with keep=False.") from error
            for entry in entries:
                self.pool.adopt(replace(entry, stored=True))
        return len(entries)

    def _resident(self, key: EntryKey) -> Resident:
        entry = self.pool.peek(key.digest)
        if entry is None:
            raise RuntimeError(f"entry {key.digest} left the pool while it was pinned")
        return entry

    def _load(self, keys: Sequence[EntryKey]) -> tuple[int, int]:
        """Make resident what the store holds of these; returns how many entries, and their bytes."""
        self.pool.reserve(sum(self.pool.pages_for(len(key.token_ids)) for key in keys))
        taken: dict[str, Tensor] = {}

        def place(key: EntryKey) -> Place:
            pages = taken[key.digest] = self.pool.allocate(len(key.token_ids), zeroed=False)
            _, _, _, kv_heads, page_size, head_dim = self.pool.kv.shape
            shape = (2, len(pages), kv_heads, page_size, head_dim)
            return Place(self.identity.dtype, shape, self.pool.memory_of(pages))

        sizes = []
        stream = self.store.stream(keys, place if self.model.device.type == "cpu" else None)
        try:
            for found in stream:
                if isinstance(found, Entry):
                    pages = taken.get(found.key.digest)
                    if pages is None:
                        pages = taken[found.key.digest] = self.pool.allocate(len(found.key.token_ids), zeroed=False)
                    if found.slabs is not None:
                        self._scatter(found, found.slabs, pages)
                    self.pool.adopt(Resident(found.key, taken.pop(found.key.digest), stored=True))
                    sizes.append(found.nbytes)
        finally:
            try:
                stream.close()  # first: until then threads write to these pages
            finally:
                for pages in taken.values():
                    self.pool.release(pages)
        return len(sizes), sum(sizes)

    def _scatter(self, found: Entry, slabs: Sequence[Slab], pages: Tensor) -> None:
        """Copy a stored entry into the pool, a layer slab at a time."""
        size = self.pool.page_size
        for memory, slab in zip(self.pool.kv, slabs, strict=True):
            tiles = torch.frombuffer(slab.data, dtype=self.model.dtype).view(slab.shape)
            if found.page_size != size:  # written with other pages: lay its tokens out anew
                tokens = tiles.transpose(1, 2).flatten(2, 3)[:, :, : len(found.key.token_ids)]
                padded = torch.nn.functional.pad(tokens, (0, 0, 0, len(pages) * size - tokens.shape[2]))
                tiles = padded.view(2, self.pool.kv.shape[3], len(pages), size, -1).transpose(1, 2)
            memory[:, pages] = tiles.to(memory.device)

    def _slabs(self, entry: Resident) -> list[Slab]:
        """An entry's layer slabs for the store, in the pool's order, padding zero."""
        slabs = []
        filled = entry.tokens - (len(entry.pages) - 1) * self.pool.page_size
        for memory in self.pool.kv:
            tiles = memory[:, entry.pages].cpu().contiguous()
            tiles[:, -1, :, filled:] = 0
            data = tiles.view(-1).view(torch.uint8).numpy().data
            slabs.append(Slab(self.identity.dtype, tuple(tiles.shape), data))
        return slabs

    def _provenance(self) -> dict[str, str]:
        """What may change an entry's rounding, for the record; never compared."""
        return {
            "device": str(self.model.device),
            "machine": platform.machine(),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
