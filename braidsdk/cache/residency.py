"""Gives requests the entries that they need in memory: finds them, loads them, or says which request computes them, and
writes them to the store.

An entry that several requests need is loaded or computed once. The request that was admitted first computes it, so
requests only wait for earlier ones. Reading, hashing and fsync run in I/O threads. These post their results to the
engine's thread, which alone changes the pool.
"""

import logging
import platform
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from time import perf_counter
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from braidsdk.cache.codecs import plain
from braidsdk.cache.pool import Pool
from braidsdk.cache.rates import Rates
from braidsdk.cache.resident import Resident, State
from braidsdk.errors import ClosedError, StoreError, UnknownChunkError
from braidsdk.models.base import Model
from braidsdk.store import ChunkStore, Entry, EntryKey, ModelIdentity, Tensors
from braidsdk.store.threads import Threads

READ_JOBS, WRITE_JOBS = 2, 1
"""How many reads and writes run at the same time. Each uses threads of its own as well."""

STAGING_BYTES = 32 * 2**20
"""Size of the pinned memory through which entries leave a GPU."""

_log = logging.getLogger(__name__)


class Need(Protocol):
    """What a request needs in memory. Compared by identity."""

    @property
    def namespace(self) -> str:
        """For whom its entries are counted."""
        ...

    @property
    def keys(self) -> Sequence[EntryKey]:
        """The keys of its entries, one per segment."""
        ...

    @property
    def keeps(self) -> Sequence[bool]:
        """For each segment, whether its entry is written to the store once it is computed."""
        ...

    @property
    def reserved(self) -> int:
        """The most tokens that its tail and its answer can have."""
        ...

    @property
    def scratch(self) -> int:
        """Tokens that it computes beside its entries and its tail, until its first token."""
        ...

    @property
    def overlay(self) -> int:
        """The most tokens of its entries that it has in another form, until it ends."""
        ...

    @property
    def computes(self) -> frozenset[EntryKey]:
        """Keys of entries that the store is known to lack. They are written even if they are resident."""
        ...


N = TypeVar("N", bound=Need)
N_contra = TypeVar("N_contra", bound=Need, contravariant=True)


class Owner(Protocol[N_contra]):
    """Hears what became of a request. It is the engine, in its own thread."""

    def post(self, work: Callable[[], None]) -> None:
        """Run something in the engine's thread soon. Any thread may call it."""
        ...

    def on_ready(self, request: N_contra) -> None:
        """Every entry that a request needs is there, or the request computes it itself. Said again after
        `keep_overlay`."""
        ...

    def on_written(self, request: N_contra) -> None:
        """A write that a request waits for has succeeded."""
        ...

    def on_failed(self, request: N_contra, error: BaseException) -> None:
        """A read or a write that a request waits for has failed."""
        ...


@dataclass(eq=False)
class Held(Generic[N]):
    """What an admitted request holds.

    Attributes:
        entries: one per segment, pinned.
        pages: pages of its tail, int64 [pages], on the CPU.
        scratch, overlay: pages of `Need.scratch` and `Need.overlay`.
        absent: its entries that were not resident when it was admitted.
        kept: its overlay if it is an entry too, pinned.
        ready: whether the engine was told that it is ready.
        writes: writes that it waits for.
    """

    entries: tuple[Resident, ...]
    pages: Tensor
    scratch: Tensor
    overlay: Tensor
    absent: tuple[Resident, ...]
    kept: Resident | None = None
    ready: bool = False
    writes: "set[_Write[N]]" = field(default_factory=set)

    @property
    def pinned(self) -> list[Resident]:
        """All entries that it holds, each once."""
        return list(dict.fromkeys((*self.entries, self.kept) if self.kept else self.entries))

    @property
    def overlay_pages(self) -> Tensor:
        """Where its overlay lies."""
        return self.kept.pages if self.kept else self.overlay


@dataclass(eq=False)
class _Making(Generic[N]):
    """An entry that is not complete yet.

    Attributes:
        holders: requests that need it, in the order of their admission. The first one computes it.
        reading: whether an I/O thread looks for it in the store.
    """

    holders: list[N]
    reading: bool


@dataclass(eq=False)
class _Write(Generic[N]):
    """Entries that are being written to the store.

    Attributes:
        entries: the entries.
        waiting: requests that wait for the write.
        computed_tokens: tokens that were computed for them; they count for the rate.
        started: when computing them began, in seconds of `time.perf_counter`.
        needed: whether those who wait fail if the store can't take the entries.
    """

    entries: list[Resident]
    waiting: list[N]
    computed_tokens: int
    started: float
    needed: bool


class Residency(Generic[N]):
    """Which request holds which entries and pages. Everything here runs in the engine's thread, except the I/O jobs.

    Attributes:
        hits, misses: entries that requests found, and those that they had to compute, by namespace.
    """

    def __init__(
        self,
        model: Model,
        pool: Pool,
        store: ChunkStore,
        identity: ModelIdentity,
        rates: Rates,
        owner: Owner[N],
    ) -> None:
        """Start without any request.

        Args:
            model: computes the entries that the store lacks.
            pool: holds the entries in memory.
            store: keeps them on disk.
            identity: identifies the model in keys.
            rates: hears how long loading and computing took.
            owner: hears what became of a request.
        """
        self.pool = pool
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self._model, self._store, self._identity, self._rates = model, store, identity, rates
        self._owner = owner
        self._held: dict[N, Held[N]] = {}
        self._making: dict[Resident, _Making[N]] = {}
        self._writing: dict[Resident, _Write[N]] = {}
        self._last_written = 0.0
        self._readers = Threads(READ_JOBS, "braid-read")
        self._writers = Threads(WRITE_JOBS, "braid-write")
        self._copies: torch.cuda.Stream | None = None
        self._staging: Tensor | None = None
        if model.device.type == "cuda":
            self._copies = torch.cuda.Stream(model.device)
            self._staging = torch.empty(STAGING_BYTES // model.dtype.itemsize, dtype=model.dtype, pin_memory=True)

    def __getitem__(self, request: N) -> Held[N]:
        return self._held[request]

    # the scheduler's Memory

    def admit(self, request: N) -> bool:
        """Pin the entries that a request needs, and take room for the missing ones and pages for its tail. Returns
        whether there was room; if not, nothing is pinned or taken.

        Small entries may lie on more pages than they fill. Where these are too many, those that only this request has
        pinned are evicted, and count as missing: they come back side by side.
        """
        pool, unique = self.pool, dict.fromkeys(request.keys)
        found = {key: entry for key in unique if (entry := pool.find(key))}
        for entry in found.values():
            pool.pin(entry)
        own = (request.reserved, request.scratch, request.overlay)
        if self._lacks_room(unique, found, own):
            scattered = [entry for entry in found.values() if entry.blocks and pool.pins(entry) == 1]
            for entry in scattered:
                del found[entry.key]
                pool.unpin(entry)
            if self._lacks_room(unique, found, own):
                for entry in found.values():
                    pool.unpin(entry)
                return False
            for entry in scattered:
                pool.drop(entry)
        new = pool.place([key for key in unique if key not in found], pool.needed((), own))
        found.update(new)
        self._making.update({entry: _Making([], reading=False) for entry in new.values()})
        for entry in found.values():
            if entry in self._making:
                self._making[entry].holders.append(request)
        pages, scratch, overlay = map(pool.take, own)
        pool.clear(pages)
        entries = tuple(found[key] for key in request.keys)
        self._held[request] = Held(entries, pages, scratch, overlay, tuple(new.values()))
        return True

    def _lacks_room(self, keys: Iterable[EntryKey], found: Container[EntryKey], own: Sequence[int]) -> bool:
        """Whether there is no room for those of these entries that were not found, and for a request's own tokens."""
        return self.pool.needed((len(key.token_ids) for key in keys if key not in found), own) > self.pool.room

    def release(self, request: N) -> None:
        """Give back everything that a request holds. If it had to compute an entry, the next request that needs the
        entry computes it."""
        held = self._held.pop(request)
        for pages in (held.pages, held.scratch, held.overlay):
            self.pool.give_back(pages)
        heirs = []
        for entry in held.pinned:
            making = self._making.get(entry)
            if making and request in making.holders:
                making.holders.remove(request)
                if not making.reading:
                    heirs += self._pass_on(entry, making)
            self.pool.unpin(entry)
        for write in held.writes:
            write.waiting.remove(request)
        for heir in dict.fromkeys(heirs):
            self._check_ready(heir)

    # from admission to ready

    def start(self, request: N) -> None:
        """Begin to load what a newly admitted request needs. The owner hears when it is ready, perhaps before this
        returns."""
        held = self._held[request]
        for entry in held.entries:
            if entry.key in request.computes and entry not in self._writing:
                entry.stored = False  # the store was asked, and lacks it
        to_read = [entry for entry in held.absent if entry.key not in request.computes]
        if to_read:
            self._begin_read(to_read)
        self._check_ready(request)

    def keep_overlay(self, request: N, key: EntryKey) -> None:
        """Make a ready request's overlay an entry: that of memory or store if it is there, else one that the first
        request that wants it computes. The owner hears again when the request is ready, perhaps before this returns."""
        held = self._held[request]
        held.ready = False
        if not any(entry.state is State.DROPPED for entry in held.entries):  # else a chunk was deleted meanwhile
            entry = self.pool.find(key)
            if entry is None:
                pages = self.pool.pages_for(len(key.token_ids))
                entry = self.pool.add(Resident(key, held.overlay[:pages]))
                held.overlay = held.overlay[pages:]
                self._making[entry] = _Making([], reading=False)
                self._begin_read([entry])
            self.pool.pin(entry)
            if entry in self._making:
                self._making[entry].holders.append(request)
            held.kept = entry
        self._check_ready(request)

    def to_compute(self, request: N) -> list[Resident]:
        """The entries that a ready request computes, in the order of its segments, its overlay last."""
        return [entry for entry in self._held[request].pinned if entry in self._making]

    def computed(self, entry: Resident) -> None:
        """All keys and values of an entry are there, or will be there before anything that is launched from now on."""
        making = self._making.pop(entry)
        if entry.state is State.LOADING:
            entry.state = State.READY
        for holder in making.holders:
            self._check_ready(holder)

    def count(self, request: N) -> None:
        """Count a ready request's entries as hits and misses; once it has a kept overlay, that one alone."""
        held = self._held[request]
        entries = {held.kept} if held.kept else set(held.entries)
        ready = entries - self._making.keys()
        self.misses[request.namespace] += len(entries) - len(ready)
        self.hits[request.namespace] += len(ready)
        self._store.count_uses(entry.key.digest for entry in ready if entry.stored)

    # after computing

    def write(self, request: N, computed_tokens: int, started: float) -> bool:
        """Begin to write the entries that a request keeps and the store lacks. Its overlay goes last and apart: if the
        store can't take it, nothing else is lost.

        Args:
            request: a request whose entries are all computed.
            computed_tokens: tokens of the entries that it computed itself.
            started: when computing them began, in seconds of `time.perf_counter`.

        Returns:
            Whether there is a write that the request waits for.
        """
        held = self._held[request]
        kept = dict.fromkeys(entry for entry, keep in zip(held.entries, request.keeps, strict=True) if keep)
        overlay = [held.kept] if held.kept else []
        held.writes = {self._writing[entry] for entry in (*kept, *overlay) if entry in self._writing}
        for entries, tokens, needed in ((kept, computed_tokens, True), (overlay, 0, False)):
            if new := [entry for entry in entries if not entry.stored]:
                held.writes.add(write := _Write[N](new, [], tokens, started, needed))
                self._begin_write(write)
        for write in held.writes:
            write.waiting.append(request)
        return bool(held.writes)

    def adopt_turn(self, request: N, key: EntryKey) -> None:
        """Keep the first tokens of a request's tail and answer resident, for the conversation's next turn.

        Args:
            request: a running request; all of these tokens are computed.
            key: names exactly those tokens.
        """
        held = self._held[request]
        if self.pool.find(key) or any(entry.state is State.DROPPED for entry in held.entries):
            return  # the same turn is resident already; or a chunk was deleted, and nothing computed after it may stay
        pages = self.pool.pages_for(len(key.token_ids))
        turn = self.pool.add(Resident(key, held.pages[:pages], state=State.READY))
        self.pool.clear_padding(turn)  # also where tokens were cut off
        held.pages = held.pages[pages:]

    def leave_scratch(self, request: N) -> None:
        """Give back a request's scratch pages. What runs on the device goes on in order, so it still finds them."""
        held = self._held[request]
        self.pool.give_back(held.scratch)
        held.scratch = held.scratch[:0]

    def close(self) -> None:
        """Wait for all writes, and for reads that have begun, and let go of model and pool. By then no request may hold
        anything."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown()
        self._copies = self._staging = None
        for each in (self._making, self._writing):  # of jobs whose results nobody takes any more
            each.clear()
        del self.pool, self._model

    def integrity(self) -> None:
        """Check pool, pins and pages against what requests hold.

        Raises:
            RuntimeError: they do not agree.
        """
        self.pool.integrity(pages for held in self._held.values() for pages in (held.pages, held.scratch, held.overlay))
        for entry, making in self._making.items():
            if not making.holders and not making.reading:
                raise RuntimeError("residency: an entry is not complete, and no request or read completes it")
            if any(holder not in self._held for holder in making.holders):
                raise RuntimeError("residency: a request that has ended still has to compute an entry")
            if entry.state is State.READY:
                raise RuntimeError("residency: an entry is ready, but not complete")

    def _check_ready(self, request: N) -> None:
        held = self._held[request]
        making = [found for entry in held.pinned if (found := self._making.get(entry))]
        if not held.ready and not any(each.reading or each.holders[0] is not request for each in making):
            held.ready = True
            self._owner.on_ready(request)

    def _pass_on(self, entry: Resident, making: _Making[N]) -> list[N]:
        """The request that computes an entry now. If there is none, the entry is dropped."""
        if making.holders:
            return making.holders[:1]
        del self._making[entry]
        self.pool.drop(entry)
        return []

    def _begin_read(self, entries: list[Resident]) -> None:
        for entry in entries:
            self._making[entry].reading = True
            self.pool.pin(entry)  # until the job has ended, because its thread writes to these pages
        try:
            self._readers.submit(self._read, entries)
        except ClosedError as error:
            for entry in entries:
                self._owner.post(partial(self._not_loaded, entry, error))

    def _begin_write(self, write: _Write[N]) -> None:
        copies = []
        for entry in write.entries:
            entry.stored = True
            self._writing[entry] = write
            self.pool.pin(entry)  # until its bytes are written
            copies.append((entry.key, self._copy_out(entry)))
        try:
            self._writers.submit(self._publish, write, copies)
        except ClosedError as error:
            self._owner.post(partial(self._published, write, error))

    # I/O jobs, and what they post

    def _read(self, entries: list[Resident]) -> None:
        """Load the entries that the store holds. Runs in an I/O thread."""
        started, loaded, count = perf_counter(), 0, 0
        by_key = {entry.key: entry for entry in entries}
        staged: dict[EntryKey, Tensor] = {}
        left = list(entries)

        def place(key: EntryKey) -> Tensors:
            entry = by_key[key]
            if self._model.device.type == "cpu":
                return self._in_pool(entry)
            tiles = staged[key] = self._tiles(entry)
            return self._in_tiles(entry, tiles)

        try:
            for found in self._store.stream([entry.key for entry in entries], place):
                entry = left.pop(0)
                if isinstance(found, Entry):
                    loaded, count = loaded + found.nbytes, count + 1
                    self._owner.post(partial(self._loaded, entry, staged.pop(entry.key, None)))
                else:
                    self._owner.post(partial(self._not_loaded, entry, None))
        except BaseException as error:
            for entry in left:
                self._owner.post(partial(self._not_loaded, entry, error))
        if loaded:
            self._rates.add("load", loaded, perf_counter() - started)
            _log.info("loaded %d entries, %d bytes in %.1f ms", count, loaded, (perf_counter() - started) * 1e3)

    def _loaded(self, entry: Resident, tiles: Tensor | None) -> None:
        """An entry was read into the pool's memory, or into memory of the host that goes there now."""
        if tiles is not None:
            for memory, layer in zip(self.pool.kv, tiles, strict=True):
                memory[:, entry.pages, :, entry.places] = layer.to(memory.device)
        self.pool.clear_padding(entry)
        entry.stored = True
        self._making[entry].reading = False
        self.computed(entry)
        self.pool.unpin(entry)

    def _not_loaded(self, entry: Resident, error: BaseException | None) -> None:
        """The store lacks the entry, or, with an error, could not be read: then the requests that need it fail."""
        making = self._making[entry]
        if error is not None:
            for holder in list(making.holders):
                self._owner.on_failed(holder, error)
        making.reading = False
        for heir in self._pass_on(entry, making):
            self._check_ready(heir)
        self.pool.unpin(entry)

    def _in_pool(self, entry: Resident) -> Tensors:
        """An entry's tensors in the pool, on a CPU."""
        memory, dtype = self.pool.kv.view(torch.uint8).numpy(), self._identity.dtype
        return plain.tensors(memory, entry.pages.tolist(), entry.tokens, dtype, entry.offset)

    def _in_tiles(self, entry: Resident, tiles: Tensor) -> Tensors:
        """An entry's tensors in tiles."""
        pages = range(len(entry.pages))
        return plain.tensors(tiles.view(torch.uint8).numpy(), pages, entry.tokens, self._identity.dtype)

    def _tiles(self, entry: Resident) -> Tensor:
        """Memory of the host for what one entry has of its pages, as the pool's."""
        layers, _, _, heads, size, head_dim = self.pool.kv.shape
        own = len(range(size)[entry.places])
        return torch.empty(layers, 2, len(entry.pages), heads, own, head_dim, dtype=self.pool.kv.dtype)

    def _publish(self, write: _Write[N], copies: Sequence[tuple[EntryKey, Callable[[], Tensors]]]) -> None:
        """Write entries durably. Runs in an I/O thread."""
        error: BaseException | None = None
        try:
            provenance = self._provenance()
            self._store.publish([(key, copy(), provenance) for key, copy in copies])
        except StoreError as failure:
            error = type(failure)(f"{failure} To answer without storing, compose with keep=False.")
            error.__cause__ = failure
        except BaseException as failure:
            error = failure
        self._owner.post(partial(self._published, write, error))

    def _published(self, write: _Write[N], error: BaseException | None) -> None:
        now = perf_counter()
        if error is None and write.computed_tokens:
            self._rates.add("compute", write.computed_tokens, now - max(write.started, self._last_written))
            self._last_written = now
        for entry in write.entries:
            del self._writing[entry]
            entry.stored = error is None
            self.pool.unpin(entry)
        if not write.needed and isinstance(error, StoreError | UnknownChunkError):
            _log.warning("an overlay was not stored: %s", type(error).__name__)
            error = None
        for request in list(write.waiting):
            if error is not None:
                self._owner.on_failed(request, error)
            else:
                write.waiting.remove(request)
                self._held[request].writes.remove(write)
                self._owner.on_written(request)

    # bytes of entries

    def _copy_out(self, entry: Resident) -> Callable[[], Tensors]:
        """Begin to copy an entry out of a GPU's pool.

        Returns:
            A function for an I/O thread. It waits for the copy and returns the entry's tensors. On a CPU these are
            where they are, in the pool.
        """
        if self._copies is None:
            return partial(self._in_pool, entry)
        computed = torch.cuda.Event()
        computed.record()
        return partial(self._copied_from_gpu, entry, computed)

    def _copied_from_gpu(self, entry: Resident, computed: torch.cuda.Event) -> Tensors:
        """Copy an entry through pinned memory, a few layers at a time. Runs in the only writing thread. A copy straight
        into ordinary memory would block the driver, and no step could be launched meanwhile."""
        if self._copies is None or self._staging is None:
            raise RuntimeError("the pool must be on a GPU; it is on a CPU")
        kv, tiles = self.pool.kv, self._tiles(entry)
        layers = max(1, self._staging.numel() // tiles[0].numel())
        if tiles[0].numel() > self._staging.numel():
            self._staging = torch.empty(tiles[0].numel(), dtype=kv.dtype, pin_memory=True)
        self._copies.wait_event(computed)
        with torch.cuda.stream(self._copies):
            pages = entry.pages.to(kv.device)
            for first in range(0, len(kv), layers):
                some = tiles[first : first + layers]
                staged = self._staging[: some.numel()].view(some.shape)
                staged.copy_(kv[first : first + layers, :, pages, :, entry.places], non_blocking=True)
                there = torch.cuda.Event(blocking=True)
                there.record()
                there.synchronize()
                some.copy_(staged)
        return self._in_tiles(entry, tiles)

    def _provenance(self) -> dict[str, str]:
        """What may change an entry's rounding. It is recorded and never compared."""
        return {
            "device": str(self._model.device),
            "machine": platform.machine(),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
