"""Moves a corpus, or named chunks of it, to another store: a plain tar file of the store's own files.

    chunks/<2 hex>/<id>.json             as in a store; names and metadata are taken over, the history of names is not
    entries/<2 hex>/<digest>.safetensors as in a store
    manifest.json                        the SHA-256 of each file before it, and the models that computed the entries
    manifest.hmac                        HMAC-SHA256 of the manifest, if a key was given

An archive may come from anyone. What is imported is copied to tmp/ first. Nothing of it is parsed or placed before all
digests, and the HMAC if there is a key, are right; then each file passes the checks of a store's own.
"""

import hashlib
import hmac
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from braidsdk.errors import ArchiveError, BraidError, StoreError, StoreFullError
from braidsdk.store import blobs, catalogue, chunks, entries
from braidsdk.store.blobs import DamagedFile
from braidsdk.store.catalogue import Record
from braidsdk.store.chunks import NewChunk
from braidsdk.store.entries import EntryRow
from braidsdk.store.files import remove, sync_folder
from braidsdk.store.keys import FORMAT_VERSION
from braidsdk.store.rebuild import row_of
from braidsdk.store.schema import kind_of
from braidsdk.store.store import ChunkStore

ARCHIVE_VERSION = 1

_CHUNK = re.compile(r"chunks/([0-9a-f]{2})/\1[0-9a-f]{30}\.json")
_ENTRY = re.compile(r"entries/([0-9a-f]{2})/\1[0-9a-f]{30}\.safetensors")
_MANIFEST, _HMAC = "manifest.json", "manifest.hmac"

_PIECE = 2**20
"""Bytes that are copied at a time."""

_MANIFEST_LIMIT = 2**30
_HEADER_LIMIT = 2**20
"""The most bytes that tarfile may read at once: an archive may claim any."""

_BATCH = 64
"""Entries that are placed in one transaction."""

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Moved:
    """What was exported or imported.

    Attributes:
        chunks: how many chunks.
        entries: how many entries.
        bytes: size of all files.
        new_chunks, new_entries: how many the store did not have; of an export they are 0.
        authenticated: whether an HMAC was written or verified.
    """

    chunks: int
    entries: int
    bytes: int
    new_chunks: int = 0
    new_entries: int = 0
    authenticated: bool = False


def export_chunks(
    store: ChunkStore,
    file: str | Path,
    namespace: str,
    *,
    ids: Sequence[str] | None = None,
    key: str | None = None,
    on_progress: Report | None = None,
) -> Moved:
    """Write chunks of a namespace and their KV entries to a new file.

    Args:
        store: the open store.
        file: the archive. It must not be there yet.
        namespace: the chunks' namespace.
        ids: the chunks. None means all. System prompts that their entries were computed after are added.
        key: signs the archive, so that whoever has the key can tell that it was not changed.
        on_progress: called with how many files were written, and how many there are.

    Raises:
        ArchiveError: the file is there already or can't be written.
        StoreError: an entry can't be read.
    """
    target = Path(file)
    partial = target.with_name(f".{target.name}.part")
    try:
        if target.exists():
            raise ArchiveError(f"{target} must not be there yet; it is. Choose another name, or delete it.")
        with ExitStack() as stack:
            raw = stack.enter_context(partial.open("xb"))
            stack.callback(remove, partial)
            os.fchmod(raw.fileno(), 0o600)
            moved = _written(store, raw, namespace, ids, key, on_progress)
            raw.flush()
            os.fsync(raw.fileno())
            os.link(partial, target)  # fails if somebody has made it meanwhile
            sync_folder(target.parent)
    except FileExistsError:
        raise ArchiveError(
            f"{partial} must not be there; another export writes it, or was killed. Delete it."
        ) from None
    except OSError as error:
        raise ArchiveError(f"{target} must be writable; got: {error.strerror}. Choose another place.") from error
    return moved


def _written(
    store: ChunkStore, raw: IO[bytes], namespace: str, ids: Sequence[str] | None, key: str | None, report: Report | None
) -> Moved:
    with store._index.read() as db:
        own = [row["id"] for row in db.table("chunks").rows_where("namespace = ?", [namespace], order_by="number")]
        rows = entries.of_namespace(db, namespace)
        wanted = set(own) if ids is None else set(ids)
        if ids is not None:
            levels = {row["id"]: row["level"] for row in db.query("select id, level from chunks")}
            seen = {each for row in rows if row.chunk_id in wanted for each in row.chunks}
            wanted |= {each for each in seen if levels.get(each) == 0}
        records = catalogue.records_of(db, [each for each in own if each in wanted])
    rows = [row for row in rows if wanted.issuperset(row.chunks)]
    digests: dict[str, str] = {}
    models: dict[str, int] = {}
    size = 0
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for each, record in records.items():
            content = catalogue.content(record)
            size += len(content)
            digests[f"chunks/{each[:2]}/{each}.json"] = _add(tar, f"chunks/{each[:2]}/{each}.json", content)
            if report:
                report(len(digests), len(records) + len(rows))
        for row in rows:
            path = store._layout.entry(row.digest)
            try:
                if blobs.read_header(path).digest != row.payload_digest:
                    raise DamagedFile("it is not the file that the index names")
                with store._leases.hold([row.digest]), path.open("rb") as source:
                    name = str(path.relative_to(store.path))
                    length = os.fstat(source.fileno()).st_size
                    digests[name] = _add(tar, name, source, length)
            except FileNotFoundError:
                continue  # it was deleted since
            except (DamagedFile, OSError) as error:
                raise StoreError(
                    f"Entry {row.digest} must be sound to be exported; {error}. Run `braid store repair`, then try "
                    "again."
                ) from error
            size += length
            weights = json.loads(row.record)["model"]["weights"]
            models[weights] = models.get(weights, 0) + 1
            if report:
                report(len(digests), len(records) + len(rows))
        manifest = {"version": ARCHIVE_VERSION, "format": FORMAT_VERSION, "models": models, "sha256": digests}
        content = json.dumps(manifest, indent=1).encode()
        _add(tar, _MANIFEST, content)
        if key is not None:
            _add(tar, _HMAC, _signature(key, content))
    return Moved(len(records), len(digests) - len(records), size, authenticated=key is not None)


def _add(tar: tarfile.TarFile, name: str, source: bytes | IO[bytes], length: int | None = None) -> str:
    """Add a file, and return its SHA-256."""
    info = tarfile.TarInfo(name)
    info.size = len(source) if isinstance(source, bytes) else int(length or 0)
    info.mode = 0o600
    reading = _Hashing(io.BytesIO(source) if isinstance(source, bytes) else source)
    tar.addfile(info, cast("IO[bytes]", reading))
    return reading.sha256.hexdigest()


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self.sha256 = source, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._source.read(count)
        self.sha256.update(data)
        return data


class _Bounded:
    """A file of which at most `_HEADER_LIMIT` bytes are read at once."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.seek, self.tell, self.close = source.seek, source.tell, source.close

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header claims {count} bytes")
        return self._source.read(count)


def import_chunks(
    store: ChunkStore,
    file: str | Path,
    *,
    replace: bool = False,
    any_model: bool = False,
    key: str | None = None,
    on_progress: Report | None = None,
) -> Moved:
    """Register the chunks of an archive in their namespaces, and store their KV entries. What the store has already
    stays; metadata of the archive replace what a chunk had.

    Args:
        store: the open store.
        file: the archive.
        replace: lets names move here from other texts.
        any_model: accepts entries of models that this store has no entry of.
        key: the archive must be signed with this key. None accepts any archive.
        on_progress: called with how many files were copied and verified; how many there are is not known: 0.

    Raises:
        ArchiveError: it is no archive, was changed, is of another format or model, or is not signed with the key.
            Nothing is imported then.
        NameTakenError: a name stands for another text here, and `replace` is off. Nothing is imported then.
        StoreReadOnlyError, StoreError: as when texts are registered.
    """
    store._index.check_writable()
    staged: dict[str, Path] = {}
    try:
        with Path(file).open("rb") as raw:
            if (size := os.fstat(raw.fileno()).st_size) > (free := store.free_bytes):
                raise StoreFullError(
                    f"The disk of {store.path} must have room for {size:,} bytes; {free:,} are free. Free some space."
                )
            digests, manifest, signature = _staged(store, raw, staged, on_progress)
        _check_manifest(manifest, signature, key, digests, Path(file))
        records = [_record(name, path) for name, path in staged.items() if name.startswith("chunks/")]
        rows = {name: _row(name, path) for name, path in staged.items() if name.startswith("entries/")}
        if not any_model:
            _check_models(store, rows.values())
        new_chunks = _register(store, records, replace=replace)
        new_entries = _place(store, rows, staged)
        size = sum(row.size for row in rows.values())
    except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, BraidError):
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArchiveError(
            f"{file} must be an archive that `braid store export` wrote; {why}. Nothing was imported."
        ) from error
    finally:
        for path in staged.values():
            with suppress(OSError):  # a later open sweeps what is left
                remove(path)
    store._collector.evict()
    return Moved(len(records), len(rows), size, new_chunks, new_entries, authenticated=key is not None)


def _staged(
    store: ChunkStore, raw: IO[bytes], staged: dict[str, Path], report: Report | None
) -> tuple[dict[str, str], bytes | None, bytes | None]:
    """Copy an archive's files to tmp/. Returns their SHA-256, the manifest and its signature."""
    digests: dict[str, str] = {}
    last: dict[str, bytes] = {}
    with tarfile.open(fileobj=cast("IO[bytes]", _Bounded(raw)), mode="r:") as tar:
        for member in tar:
            source = tar.extractfile(member) if member.type == tarfile.REGTYPE and not member.sparse else None
            if source is None or member.name in digests or member.name in last:
                raise tarfile.ReadError(f"it holds {member.name[:80]!r}, which is no file or is there twice")
            if member.name in (_MANIFEST, _HMAC):
                if member.size > _MANIFEST_LIMIT:
                    raise tarfile.ReadError(f"its {member.name} has {member.size} bytes")
                last[member.name] = b"".join(iter(lambda source=source: source.read(_PIECE), b""))  # type: ignore[misc]
                continue
            if last or not (_CHUNK.fullmatch(member.name) or _ENTRY.fullmatch(member.name)):
                raise tarfile.ReadError(f"it holds {member.name[:80]!r}, which no export writes there")
            reading = _Hashing(source)
            path = staged[member.name] = store._layout.temporary(Path(member.name).stem)
            _copy(reading, path, store._layout.mode)
            digests[member.name] = reading.sha256.hexdigest()
            if report:
                report(len(digests), 0)
    return digests, last.get(_MANIFEST), last.get(_HMAC)


def _copy(reading: _Hashing, path: Path, mode: int) -> None:
    """Copy a file of an archive durably.

    Raises:
        StoreError: the disk is full or fails.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as copy:
            os.fchmod(descriptor, mode)
            while piece := reading.read(_PIECE):
                copy.write(piece)
            copy.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise kind_of(error)(
            f"A file of the archive could not be copied to {path.parent}: {error.strerror}. Free some space or correct "
            "what fails. Nothing was imported."
        ) from error


def _check_manifest(
    content: bytes | None, signature: bytes | None, key: str | None, digests: dict[str, str], file: Path
) -> None:
    """Check that the manifest is that of these files, and of whoever has the key."""
    if content is None:
        raise ArchiveError(f"{file} must end with a manifest; it has none. Copy it again: it may have been cut off.")
    if key is not None and not hmac.compare_digest(signature or b"", _signature(key, content)):
        what = "it is signed with another key, or was changed" if signature else "it is not signed"
        raise ArchiveError(f"{file} must be signed with the key; {what}. Get it from whoever has the key.")
    try:
        found = json.loads(content)
        versions = found["version"], found["format"]
        named = found["sha256"]
        if not isinstance(named, dict):
            raise TypeError("sha256")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ArchiveError(f"The manifest of {file} must be one of an export; it can't be read.") from None
    if versions != (ARCHIVE_VERSION, FORMAT_VERSION):
        raise ArchiveError(
            f"{file} must be of version {ARCHIVE_VERSION} and hold entries of format {FORMAT_VERSION}; got "
            f"{versions[0]!r} and {versions[1]!r}. Export it again with this version of braidsdk."
        )
    if named != digests:
        wrong = next((each for each in {**named, **digests} if named.get(each) != digests.get(each)), "")
        raise ArchiveError(f"{file} must hold what its manifest says; {wrong[:80]} differs. Copy it again.")


def _check_models(store: ChunkStore, rows: Iterable[EntryRow]) -> None:
    with store._index.read() as db:
        here = {row[0] for row in db.execute("select distinct weights from entries")}
    others = {json.loads(row.record)["model"]["weights"] for row in rows} - here
    if here and others:
        theirs, ours = (", ".join(each[:12] for each in some) for some in (others, here))
        raise ArchiveError(
            f"The archive's entries must be of models that this store has entries of; some are of {theirs}, and the "
            f"store's are of {ours}. Import it into a store of that model, or allow any model (--any-model)."
        )


def _record(name: str, path: Path) -> Record:
    try:
        return catalogue.read(path, Path(name).stem)
    except DamagedFile as error:
        raise ArchiveError(f"{name} in the archive must be a chunk's file; {error}. Nothing was imported.") from None


def _row(name: str, path: Path) -> EntryRow:
    try:
        header = blobs.read(path).header  # every byte
        return row_of(path, header, Path(name).stem)
    except DamagedFile as error:
        raise ArchiveError(f"{name} in the archive must be an entry's file; {error}. Nothing was imported.") from None


def _register(store: ChunkStore, records: Iterable[Record], *, replace: bool) -> int:
    """Register chunks in the order in which they were registered, with all their names, all or none."""
    new = 0
    with store._changing() as db:
        for record in sorted(records, key=lambda record: record.chunk["number"]):
            chunk = record.chunk
            there = chunks.find_many(db, chunk["namespace"], [chunk["id"]])
            new += not there
            metadata = json.loads(chunk["metadata"])
            for name in [each["name"] for each in record.names] or [None]:
                text = (chunk["namespace"], chunk["level"], chunk["text"])
                chunks.add(db, NewChunk(*text, name, metadata or None), replace=replace)
            if chunk["pinned"]:
                row = chunks.find_many(db, chunk["namespace"], [chunk["id"]])[chunk["id"]]
                chunks.update(db, row, name=None, metadata=None, replace=False, pinned=True)
    return new


def _place(store: ChunkStore, rows: dict[str, EntryRow], staged: dict[str, Path]) -> int:
    """Move entries to their places, and add them to the index. Those of chunks that are not registered, or not any
    more, stay out."""
    new, names = 0, list(rows)
    for start in range(0, len(names), _BATCH):
        some = {rows[name].digest: name for name in names[start : start + _BATCH]}
        with store._index.write() as db:
            there = entries.known(db, some)
            owners = chunks.owners(db, {each for name in some.values() for each in rows[name].chunks})
            missing = [
                digest
                for digest, name in some.items()
                if digest not in there and all(owners[each] for each in rows[name].chunks)
            ]
            store._layout.place((staged[some[digest]], store._layout.entry(digest)) for digest in missing)
            entries.insert(db, [rows[some[digest]] for digest in missing])
        new += len(missing)
    return new


def _signature(key: str, content: bytes) -> bytes:
    return hmac.new(key.encode(), content, hashlib.sha256).hexdigest().encode()
