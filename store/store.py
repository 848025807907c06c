"""The chunk store: registered chunks and their computed KV entries, on disk, shared by processes.

The index finds everything, and can be rebuilt from the files of chunks and entries. Entries' files are moved only under
the index's write lock, so a process never sees half of what another one publishes, deletes or sets aside. Knows nothing
about models or modes.
"""

import contextlib
import errno
import logging
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from sqlite_utils import Database

from braidsdk.errors import (
    InputError,
    StoreError,
    StoreFullError,
    StorePathError,
    StoreReplacedError,
    UnknownChunkError,
    shown,
)
from braidsdk.store import blobs, chunks, entries, limits, memory, reasons
from braidsdk.store.blobs import DamagedFile, Tensors
from braidsdk.store.catalogue import SETTLE, Catalogue
from braidsdk.store.check import Checked, check
from braidsdk.store.chunks import ChunkFilter, ChunkRow, NameVersion, NewChunk
from braidsdk.store.claims import Claims, Leases
from braidsdk.store.collect import DAMAGED_S, Collected, Collector
from braidsdk.store.entries import Entry, EntryGroup, EntryRow, Hit
from braidsdk.store.files import Layout, Stamp, remove, stamp
from braidsdk.store.index import Index
from braidsdk.store.keys import EntryKey
from braidsdk.store.limits import WHOLE, Limit
from braidsdk.store.reasons import Miss
from braidsdk.store.rebuild import Rebuilt, rebuild
from braidsdk.store.recent import RecentChunks
from braidsdk.store.schema import kind_of
from braidsdk.store.threads import threads

_log = logging.getLogger(__name__)

READERS = 2
"""Threads that read entries, each one entry at a time. What they have read waits until it is asked for."""

KEEP_USES_S = 60.0
"""A process that only reads keeps its counts of uses this often."""

WRITERS = 2
"""Threads that write entries: while one waits for the disk, the other goes on."""

Publication = tuple[EntryKey, Tensors, Mapping[str, Any]]
"""A key, its tensors, and its provenance: text, numbers, bools and None by name, which are kept and not compared."""


@dataclass(frozen=True)
class StoreStats:
    """What a namespace holds: chunks, entries, their bytes of KV, and files set aside so far.

    `groups` counts entries and bytes by model, dtype and level.
    """

    chunks: int
    entries: int
    bytes: int
    damaged: int
    groups: tuple[EntryGroup, ...] = ()


@dataclass(frozen=True)
class Deleted:
    """What was deleted: how many chunks, the digests of entries, and the entries' bytes of KV."""

    chunks: int
    digests: tuple[str, ...]
    bytes: int


class ChunkStore:
    """A folder of chunks and KV entries.

    `claims` says which entries this process computes. `rebuilt` says what the index was rebuilt from when the store was
    opened, and is None if it was there.

    Several threads may share one. Each process opens its own. A missing index is rebuilt from the files.
    """

    def __init__(self, path: str | Path, *, index: str | Path | None = None) -> None:
        """Open the store in a folder, and create what is missing.

        Args:
            path: the store's folder.
            index: a local folder for the index and the locks, for a store on a network file system. One machine may
                have such a store open at a time. None is the store's folder.

        Raises:
            StorePathError: the path is a file, or can't be written; or the index is elsewhere, or would be on a network
                file system.
            StoreVersionError: a newer version wrote it.
            StoreCorruptError: its index is damaged.
        """
        self._layout = Layout(Path(path).absolute(), index)
        self.rebuilt: Rebuilt | None = None
        try:
            self._open()
        except OSError as error:
            self._layout.close()
            raise StorePathError(
                f"The files of the store at {path} must be readable; got: {error.strerror} ({error.filename}). Correct "
                "the permissions, or choose another path."
            ) from error
        except BaseException:
            self._layout.close()
            raise

    def _open(self) -> None:
        self._index = Index(
            self._layout.index, queue=self._layout.queue, read_only=self._layout.read_only, first=self._rebuild
        )
        if self.rebuilt:  # once the index has them, and before chunks' files are written again
            for (damaged, _), name in zip(self.rebuilt.damaged, self.rebuilt.aside, strict=True):
                self._layout.set_aside(damaged, name)
        self._recent = RecentChunks(self._index)
        self._catalogue = Catalogue(self._layout, self._index)
        self._changes = Lock()
        self.claims = Claims(None if self.read_only else self._layout.claims)
        self._leases = Leases(None if self.read_only else self._layout.leases)
        self._collector = Collector(self._index, self._layout, self._leases)
        self._uses: Counter[str] = Counter()
        self._uses_lock, self._uses_kept = Lock(), time.monotonic()
        try:
            if not self.read_only:
                self._catch_up()
                with contextlib.suppress(StoreFullError):  # as far as the disk allows it
                    self._collector.sweep_if_due()
                self._layout.keep_reserve()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The store's folder, absolute."""
        return self._layout.root

    def close(self) -> None:
        """Close the store. Safe to call twice. Entries that were loaded stay valid."""
        try:
            with contextlib.suppress(StoreError):  # the next opening does the first, and the second is only statistics
                self._catalogue.settle()
                self.remember({})
        finally:
            self._index.close()
            self.claims.close()
            self._leases.close()
            self._layout.close()

    @property
    def read_only(self) -> bool:
        """Whether the store can only be read."""
        return self._layout.read_only

    # chunks

    def add_chunk(
        self,
        *,
        namespace: str,
        level: int,
        text: str,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> ChunkRow:
        """Register normalised text, or find it if it is registered. Metadata that is given replaces what was there.

        Raises:
            NameTakenError: the name stands for another text, and `replace` is off. With `replace` the name moves, and
                the old chunk and its id stay.
            InputError: the name, namespace, text or metadata can't be used.
            HashCollisionError: another text has this text's id.
        """
        return self.add_chunks([NewChunk(namespace, level, text, name, metadata)], replace=replace)[0]

    def add_chunks(self, new: Sequence[NewChunk], *, replace: bool = False) -> list[ChunkRow]:
        """Register many texts in one transaction, all or none. Raises the same errors as `add_chunk`."""
        with self._changing() as db:
            return [chunks.add(db, chunk, replace=replace) for chunk in new]

    def add_good_chunks(self, new: Sequence[NewChunk], *, replace: bool = False) -> list[ChunkRow | InputError]:
        """Register many texts in one transaction. For a text that can't be registered, the result is the error that
        `add_chunk` would raise."""
        results: list[ChunkRow | InputError] = []
        with self._changing() as db:
            for chunk in new:
                db.execute("savepoint one_chunk")
                try:
                    results.append(chunks.add(db, chunk, replace=replace))
                except InputError as error:
                    db.execute("rollback to one_chunk")
                    results.append(error)
                db.execute("release one_chunk")
        return results

    def update_chunk(
        self,
        namespace: str,
        chunk_id: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        pinned: bool | None = None,
    ) -> ChunkRow:
        """Give a chunk metadata in place of what it has, one more name, or a pin. None changes nothing.

        Raises:
            UnknownChunkError: it is not registered, or not any more.
            NameTakenError: the name stands for another text, and `replace` is off.
            InputError: the name or metadata can't be used.
        """
        with self._changing() as db:
            row = chunks.find_many(db, namespace, [chunk_id]).get(chunk_id)
            if row is None:
                raise UnknownChunkError(
                    f"Chunk {chunk_id} must be registered in namespace {shown(namespace)}; it is not, or it was "
                    "deleted. Register it again."
                )
            return chunks.update(db, row, name=name, metadata=metadata, replace=replace, pinned=pinned)

    def versions(self, namespace: str, name: str) -> list[NameVersion]:
        """Return what a name stands for and stood for, the newest first: at most `FORMER_NAMES` chunks before the
        present one, and none that were deleted."""
        with self._index.read() as db:
            return chunks.versions(db, namespace, name)

    def restore_name(self, namespace: str, name: str, chunk_id: str | None = None) -> ChunkRow:
        """Let a name stand again for a chunk that it stood for; None takes the one before the present one.

        Raises:
            UnknownChunkError: the name is unknown, or never stood for this chunk, or for no other one.
        """
        with self._changing() as db:
            return chunks.restore(db, namespace, name, chunk_id)

    def find_chunk(self, namespace: str, name_or_id: str) -> ChunkRow | None:
        """Return the chunk of that name, else the one of that id, else None."""
        with self._index.read() as db:
            return chunks.find(db, namespace, name_or_id)

    def find_named(self, namespace: str, names_or_ids: Iterable[str]) -> dict[str, ChunkRow]:
        """Return the chunks of these names, else ids, by the name or id. Unknown ones are left out."""
        return self._recent.find_named(namespace, names_or_ids)

    def find_chunks(self, namespace: str, ids: Iterable[str]) -> dict[str, ChunkRow]:
        """Return the chunks of these ids, by id. Unknown ids are left out."""
        with self._index.read() as db:
            return chunks.find_many(db, namespace, ids)

    def known_chunks(self, namespace: str, ids: Iterable[str]) -> set[str]:
        """Return those of the ids that are registered in the namespace."""
        if self._uses and time.monotonic() - self._uses_kept > KEEP_USES_S:
            with contextlib.suppress(StoreError):  # they are only statistics
                self.remember({})
        return self._recent.known(namespace, ids)

    def list_chunks(
        self,
        namespace: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        level: int | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> list[ChunkRow]:
        """Return the namespace's chunks in the order of registration.

        Args:
            namespace: the namespace of the chunks.
            name, metadata, level: see `ChunkFilter`.
            limit: the most chunks to return.
            after: id of a chunk. Only chunks that were registered after it are returned, and none if it was deleted.

        Raises:
            InputError: the pattern or the metadata can't be looked for.
        """
        with self._index.read() as db:
            return chunks.select(db, namespace, ChunkFilter(name, metadata, level), limit=limit, after=after)

    def chunk_ids(self, namespace: str) -> list[str]:
        """Return the ids of the namespace's chunks in the order of registration."""
        with self._index.read() as db:
            rows = db.table("chunks").rows_where("namespace = ?", [namespace], select="id", order_by="number")
            return [row["id"] for row in rows]

    def count_chunks(
        self,
        namespace: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        level: int | None = None,
    ) -> int:
        """Return how many chunks `list_chunks` would return. Reads no text."""
        with self._index.read() as db:
            return chunks.count(db, namespace, ChunkFilter(name, metadata, level))

    def close_names(self, namespace: str, name: str) -> list[str]:
        """Return up to three registered names that resemble this one, for an error's message."""
        with self._index.read() as db:
            return chunks.close_names(db, namespace, name)

    def delete_chunk(self, namespace: str, chunk_id: str) -> tuple[str, ...]:
        """Delete a chunk, its names, its entries and every entry that was computed after it.

        Returns:
            The digests of the deleted entries, none if the chunk is not there. Deleting twice is harmless.
        """
        return self.delete_chunks(namespace, [chunk_id]).digests

    def delete_chunks(self, namespace: str, ids: Iterable[str]) -> Deleted:
        """Delete many chunks in one transaction, all or none, even if the disk is full."""
        wanted = list(ids)
        return self._collector.freeing(lambda: self._delete_chunks(namespace, wanted))

    def _delete_chunks(self, namespace: str, ids: Sequence[str]) -> Deleted:
        gone: dict[str, int] = {}
        aside: list[str] = []
        with self._changing(removes=lambda: self._collector.remove_entries(list(gone), aside)) as db:
            owners = chunks.owners(db, ids)
            # Entries may have been computed after a chunk without a row: a rebuilt index may know only its id.
            free = [each for each, owner in owners.items() if owner in (namespace, None)]
            gone |= entries.delete_of_chunks(db, free)
            for digest in gone:
                self._layout.entry(digest)  # raises if it is not a digest; then nothing is deleted
            aside += entries.forget_damaged(db, free)
            chunks.delete(db, free)
            known, nbytes = sum(owner == namespace for owner in owners.values()), sum(gone.values())
        return Deleted(known, tuple(gone), nbytes)

    # entries

    def look_up(self, keys: Sequence[EntryKey]) -> list[Hit | None]:
        """Return for each key, in order, what the index knows about its entry. None means that it has none. Opens no
        entry's file."""
        with self._index.read() as db:
            return entries.look_up(db, keys, self._layout)

    def explain(self, keys: Sequence[EntryKey]) -> list[Miss]:
        """Say for each key, in order, why its entry was not found. It is slower than `look_up`, and opens no entry's
        file."""
        with self._index.read() as db:
            return reasons.explain(db, keys)

    def entries_of(self, namespace: str, chunk_id: str) -> list[EntryRow]:
        """Return what the index knows about the own entries of a namespace's chunk, oldest first. Opens no entry's
        file."""
        with self._index.read() as db:
            return entries.of_chunk(db, namespace, chunk_id)

    def check(self, share: float = 0.0, on_progress: Callable[[int, int], None] | None = None) -> Checked:
        """Look at everything that the store holds, and change nothing; see `check.check`."""
        with self._in_place():
            return check(self._index, self._layout, share, on_progress)

    def load(self, keys: Sequence[EntryKey]) -> list[Entry | None]:
        """Read and verify the entry of each key, in order. None means that there is none.

        A damaged or missing file is set aside and counted, and its entry is None. `explain` then says "damaged". Wrong
        data is never returned.

        Raises:
            StoreError: a file can't be read, for a reason other than its content.
        """
        return list(self.stream(keys))

    def stream(
        self, keys: Sequence[EntryKey], place: Callable[[EntryKey], Tensors] | None = None
    ) -> Generator[Entry | None, None, None]:
        """Like `load`, but one entry at a time. Threads read the next ones meanwhile, so few are in memory at a time.

        Args:
            keys: the keys of the entries.
            place: gives the tensors that an entry must have, with the memory to read them into. A thread calls it
                before it reads the entry. If an entry is set aside, its memory may have been written to. Threads write
                to the memory until this iterator has ended or was closed.
        """
        with self._leases.hold(key.digest for key in keys):
            found = self.look_up(keys)
            self.count_uses(hit.digest for hit in found if hit)
            if len(keys) == 1:
                yield self._load(keys[0], found[0], place)
                return
            jobs = iter([(key, hit, place) for key, hit in zip(keys, found, strict=True)])
            with threads(READERS) as readers:
                ahead = deque(readers.submit(self._load, *job) for job in islice(jobs, READERS))
                while ahead:
                    result = ahead.popleft().result()
                    if (job := next(jobs, None)) is not None:
                        ahead.append(readers.submit(self._load, *job))
                    yield result

    def publish(self, publications: Sequence[Publication]) -> None:
        """Store entries durably, all or none. Entries that the store has already stay as they are.

        A key with the same digest as another entry is not stored. `explain` then says "collision".

        Raises:
            InputError: a tensor or the provenance can't be written.
            UnknownChunkError: a chunk that an entry belongs to or was computed after is not registered, or not any
                more.
            StoreReadOnlyError: the store can only be read.
            StoreError: the disk is full or fails. The store is as it was before.
        """
        self._index.check_writable()
        started = perf_counter()
        new = {key.digest: (key, tensors, provenance) for key, tensors, provenance in publications}
        with self._index.read() as db:
            for digest in entries.known(db, new):
                del new[digest]
            records = self._records(db, [key for key, _, _ in new.values()])
        written: dict[str, Path] = {}
        placed: list[str] = []
        try:
            if len(new) > 1:
                with threads(WRITERS) as writers:
                    entered = list(writers.map(lambda each: self._write(each, records, written), new.values()))
            else:
                entered = [self._write(each, records, written) for each in new.values()]
            rows = {row.digest: row for row in entered}
            with self._index.write() as db:
                self._records(db, [key for key, _, _ in new.values()])  # again, because a chunk may have been deleted
                for digest in entries.known(db, rows):
                    del rows[digest]  # another process was quicker
                placed = list(rows)
                self._layout.place((written[digest], self._layout.entry(digest)) for digest in placed)
                entries.insert(db, list(rows.values()))
                self._keep_uses(db)
            written_bytes = sum(row.bytes for row in rows.values())
            _log.info("published %d entries, %d bytes in %.1f ms", len(rows), written_bytes, _ms_since(started))
        except BaseException as error:
            with contextlib.suppress(StoreError):  # a later open sweeps what is left
                self._collector.remove_entries(placed)
            if isinstance(error, OSError):
                raise self._write_error(error) from error
            raise
        finally:
            for path in written.values():
                with contextlib.suppress(OSError):  # a later open sweeps what is left
                    remove(path)
        try:
            self._collector.evict(spared=rows)
        except StoreError as error:
            _log.warning("the store may be over its limits until the next publication: %s", error)

    # limits

    def limits(self) -> dict[str, Limit]:
        """Return the limits by namespace; "" is the whole store's.

        Raises:
            StoreCorruptError: limits.json can't be read.
        """
        return limits.read(self._layout)

    def set_limit(self, limit: Limit, namespace: str = WHOLE) -> Collected:
        """Limit the store, or a namespace of it, for all processes from now on, and evict what is over the limit. Only
        KV entries are evicted: texts stay until they are deleted."""
        with self._index.write() as db:
            limits.write(self._layout, {**self.limits(), namespace: limit})
            self._keep_uses(db)
        return self._collector.evict(by_age=True)

    def collect(self, *, damaged_s: float = DAMAGED_S) -> Collected:
        """Evict what is over the limits or too old, and remove what killed processes left and what was set aside longer
        than `damaged_s` seconds ago. A publication and the first opening of a day do this too."""
        with self._in_place():
            self.remember({})
            return self._collector.collect(damaged_s=damaged_s)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Something that looks at all files of the store.

        Raises:
            StoreReplacedError: the folder was removed or replaced.
            StoreError: a file can't be read.
        """
        try:
            with self._index.read():
                pass
            yield
        except OSError as error:
            with self._index.read():
                pass
            raise StoreError(
                f"All files of the store at {self.path} must be readable; got: {error.strerror} ({error.filename}). "
                "Correct what fails, and try again."
            ) from error

    def count_uses(self, digests: Iterable[str]) -> None:
        """Count uses of entries. They are kept with the next publication, `remember` or closing, or by a later call of
        `known_chunks`."""
        with self._uses_lock:
            self._uses.update(digests)

    def _keep_uses(self, db: Database) -> None:
        with self._uses_lock:
            uses, self._uses, self._uses_kept = self._uses, Counter(), time.monotonic()
        if uses:
            entries.count_uses(db, uses)

    @property
    def damaged_count(self) -> int:
        """How many files were set aside so far, in all namespaces."""
        with self._index.read() as db:
            return db.table("damage").count

    def namespaces(self) -> list[str]:
        """Return the names of all namespaces that have a chunk or an entry, for whoever keeps the store."""
        with self._index.read() as db:
            rows = db.execute("select namespace from chunks union select namespace from entries order by 1")
            return [row[0] for row in rows]

    def stats(self, namespace: str) -> StoreStats:
        """Count what a namespace holds."""
        with self._index.read() as db:
            groups = tuple(entries.groups(db, namespace))
            return StoreStats(
                chunks=chunks.count(db, namespace, ChunkFilter()),
                entries=sum(group.entries for group in groups),
                bytes=sum(group.bytes for group in groups),
                damaged=entries.count_damaged(db, namespace),
                groups=groups,
            )

    @property
    def free_bytes(self) -> int:
        """Free space on the store's disk.

        Raises:
            StoreError: the free space can't be read.
        """
        try:
            return shutil.disk_usage(self.path).free
        except OSError as error:
            raise StoreError(
                f"The free space at {self.path} can't be read: {error.strerror}. Check that the folder is still there."
            ) from error

    # what processes remember for later ones

    def version(self) -> tuple[int, int]:
        """Return a value that changes when anything may have been written, by this process or another. This takes
        microseconds."""
        return self._index.version()

    def recall(self, keys: Iterable[str]) -> dict[str, str]:
        """Return what was remembered under these keys. Unknown keys are left out."""
        with self._index.read() as db:
            return memory.recall(db, keys)

    def recall_all(self, start: str) -> dict[str, str]:
        """Return everything that was remembered under keys that begin with `start`, in the order of the keys."""
        with self._index.read() as db:
            return memory.recall_all(db, start)

    def remember(self, values: Mapping[str, str], *, add: Mapping[str, int] | None = None) -> None:
        """Keep values for later processes, and add to counts. Moving the index aside forgets them, and so does a store
        that can only be read."""
        if (values or add or self._uses) and not self.read_only:
            with self._index.write() as db:
                memory.remember(db, values)
                memory.count(db, add or {})
                self._keep_uses(db)

    @contextmanager
    def _changing(self, *, removes: Callable[[], object] | None = None) -> Iterator[Database]:
        """A transaction that changes chunks. Their files follow it. `removes` removes other files of chunks that the
        transaction deletes, after the commit, whatever becomes of the chunks' own files."""
        self._index.check_writable()
        with self._changes:
            try:
                with self._index.write() as db:
                    yield db
                    self._catalogue.prepare(db)
                try:
                    try:
                        self._catalogue.publish()
                        self._catalogue.settle(SETTLE)
                    finally:
                        if removes:
                            removes()
                except StoreReplacedError:
                    raise  # nothing was kept
                except StoreError as error:
                    if removes:
                        raise StoreError(
                            f"The chunks are deleted, and not all of their files at {self.path} could be removed: "
                            f"{error.__cause__ or error}. Their text may still be there. Correct what fails, and run "
                            "`braid gc`."
                        ) from error
                    _log.warning("chunks are registered, and their files follow at the next change: %s", error)
            finally:
                self._catalogue.discard()

    def _rebuild(self, db: Database) -> None:
        found = self.rebuilt = rebuild(db, self._layout)
        if found.chunks or found.entries or found.damaged:
            _log.warning(
                "the index was rebuilt from the files: %d chunks, %d entries, %d damaged files",
                *(found.chunks, found.entries, len(found.damaged)),
            )

    def _catch_up(self) -> None:
        """Write the chunks' files that a process could not write, as far as the disk allows it."""
        try:
            if not self._layout.chunks.is_dir():
                with self._index.write() as db:
                    chunks.touch_all(db)
                self._layout.make_chunks()  # now that the index knows that all files are missing
            self._catalogue.catch_up()
        except StoreFullError as error:
            _log.warning("files of chunks could not be written: %s", error)

    def _load(self, key: EntryKey, hit: Hit | None, place: Callable[[EntryKey], Tensors] | None) -> Entry | None:
        failed = False
        while hit:
            before = stamp(hit.path)
            try:
                blob = blobs.read(hit.path, place(key) if place else None, digest=hit.payload_digest)
                if blob.token_bytes != key.token_bytes or blob.header.key != key.record():
                    raise DamagedFile("it holds another entry than the index says")
                return Entry(key, blob.tensors, blob.header.nbytes, blob.header.provenance)
            except DamagedFile as error:
                why = str(error)
            except FileNotFoundError:
                why = "it is missing"
            except OSError as error:
                if error.errno != errno.EIO:
                    raise StoreError(
                        f"{hit.path} can't be read: {error.strerror}. Correct what fails, such as its permissions."
                    ) from error
                if not failed:  # it may pass
                    failed = True
                    continue
                why = "the disk failed to read it, twice"
            hit = self._set_aside(key, hit, before, why)
        return None

    def _set_aside(self, key: EntryKey, hit: Hit, read: Stamp | None, why: str) -> Hit | None:
        """Take a damaged file out of the store, unless another file has taken its place since it was looked up or read,
        or the store can only be read.

        Returns:
            The entry's new file, or None if it has none now.
        """
        if self.read_only:
            _log.warning("entry %s is damaged and stays in its place: %s", key.digest, why)
            return None
        with self._index.write() as db:
            if entries.look_up(db, [key], self._layout) == [hit] and stamp(hit.path) == read:
                moved = self._layout.set_aside(self._layout.entry(key.digest))
                _log.warning("set aside entry %s: %s", key.digest, why)
                entries.delete_damaged(db, key.digest, file=moved, why=why)
            return entries.look_up(db, [key], self._layout)[0]

    def _write(self, publication: Publication, records: Mapping[str, Any], written: dict[str, Path]) -> EntryRow:
        key, tensors, provenance = publication
        path = written[key.digest] = self._layout.temporary(key.digest)
        payload_digest = blobs.write(
            path,
            key=key,
            chunk=None if key.chunk_id is None else records[key.chunk_id],
            tensors=tensors,
            provenance=provenance,
            created=chunks.now(),
            mode=self._layout.mode,
        )
        return EntryRow(
            digest=key.digest,
            chunk_id=key.chunk_id,
            record=key.record_json,
            tokens_sha256=key.token_sha256,
            tokens=len(key.token_ids),
            bytes=sum(each.nbytes for each in tensors.values()),
            size=path.stat().st_size,
            payload_digest=payload_digest,
            chunks=key.chunk_ids(),
        )

    def _records(self, db: Database, keys: Sequence[EntryKey]) -> dict[str, dict[str, Any]]:
        """Return what a file records about each chunk of these entries, and refuse chunks that are not registered."""
        records: dict[str, dict[str, Any]] = {}
        for namespace in dict.fromkeys(key.namespace for key in keys):
            wanted = dict.fromkeys(chunk for key in keys if key.namespace == namespace for chunk in key.chunk_ids())
            found = chunks.find_many(db, namespace, wanted)
            for chunk in wanted:
                if chunk not in found:
                    raise UnknownChunkError(
                        f"Chunk {chunk} must be registered in namespace {namespace!r} before an entry of it is stored; "
                        "it is not, or it was deleted. Register it again."
                    )
                row = found[chunk]
                records[chunk] = {"id": row.id, "namespace": row.namespace, "level": row.level, "text": row.text}
        return records

    def _write_error(self, error: OSError) -> StoreError:
        return kind_of(error)(
            f"An entry could not be written to the store at {self.path}: {error.strerror}. Free some space or correct "
            "what fails. Nothing of the entry is left, and the store is as it was before."
        )


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1e3
