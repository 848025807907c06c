"""Keeps the text, names and metadata of each chunk in a file of its own too, so that they outlive the index.

The index is the truth as long as it is sound, and the files follow it. A transaction that changes a chunk marks it as
stale. Before the commit its new file is written and synced beside its place, so that a full disk fails the transaction.
After the commit the file is moved to its place and the mark is removed, by a later transaction. If the process dies in
between, the mark stays, and whoever opens the store writes the file from the index.

A chunk without a file was deleted: entries that outlive their deletion bring nothing back.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import xxhash
from sqlite_utils import Database

from braidsdk.errors import StoreCorruptError
from braidsdk.store import chunks
from braidsdk.store.blobs import DamagedFile, opened
from braidsdk.store.files import Layout, remove
from braidsdk.store.index import Index
from braidsdk.store.keys import canonical_json, chunk_id

LIMIT_BYTES = 2**30
"""A larger file is damaged. Texts are far smaller."""

SETTLE = 64
"""So many marks are removed at once. Fewer wait for the next change."""

BATCH = 256
"""Chunks whose files are moved in one look at the index. Writers wait meanwhile."""

_START, _MIDDLE = b'{"digest":"', b'","chunk":'
_DIGEST = slice(len(_START), len(_START) + 32)


@dataclass(frozen=True)
class Record:
    """What a chunk's file holds.

    Attributes:
        chunk: `id`, `namespace`, `level`, `text`, `metadata` (JSON text), `created`, `number`, `pinned`.
        names: of each name `name`, `number`, `since`.
        former: of each name that it had before `name`, `number`, `since`, `until`.
    """

    chunk: dict[str, Any]
    names: list[dict[str, Any]] = field(default_factory=list)
    former: list[dict[str, Any]] = field(default_factory=list)


class Catalogue:
    """The chunks' files, as this process writes them. The caller holds the index's lock."""

    def __init__(self, layout: Layout, index: Index) -> None:
        self._layout, self._index = layout, index
        self._prepared: dict[str, tuple[int, Path]] = {}
        self._moved: dict[str, int] = {}

    def prepare(self, db: Database) -> None:
        """Write the new files of all stale chunks beside their places, at the end of the transaction that changes them.

        Raises:
            OSError: the disk is full or fails.
        """
        self._unmark(db)
        for wanted in _stale_by_batches(db):
            self._prepare(db, wanted)

    def discard(self) -> None:
        """Remove what was prepared and not moved."""
        prepared, self._prepared = self._prepared, {}
        for _, path in prepared.values():
            with contextlib.suppress(OSError):  # a later open sweeps what is left
                remove(path)

    def publish(self) -> None:
        """Move the files of stale chunks to their places, and remove those of deleted ones, after the commit.

        A reader's lock is held meanwhile, so that no other process changes the same chunks and moves its files before
        ours.

        Raises:
            StoreError: that failed. The next opening of the store does it.
        """
        after = ""
        while True:
            with self._index.read() as db:
                some = stale(db, after=after, limit=BATCH)
                self._move(db, {each: change for each, change in some.items() if self._moved.get(each) != change})
            if len(some) < BATCH:
                return
            after = max(some)

    def _prepare(self, db: Database, wanted: Mapping[str, int]) -> None:
        """Write files, except those that are right already: another process has marked them, and moved its files."""
        for each, record in records_of(db, list(wanted)).items():
            if difference(self._layout.chunk(each), record):
                self._write(each, wanted[each], record)

    def _move(self, db: Database, wanted: Mapping[str, int]) -> None:
        # Not prepared: another process has marked them, and may not live any more.
        late = {each: change for each, change in wanted.items() if self._prepared.get(each, (None,))[0] != change}
        self._prepare(db, late)
        there = chunks.owners(db, wanted)
        self._layout.place(
            [
                (self._prepared[each][1], self._layout.chunk(each))
                for each, change in wanted.items()
                if there[each] and self._prepared.get(each, (None,))[0] == change
            ],
            [self._layout.chunk(each) for each in wanted if not there[each]],
        )
        for each in wanted:
            self._prepared.pop(each, None)
        self._moved.update(wanted)

    def _write(self, each: str, change: int, record: Record) -> None:
        path = self._layout.temporary(each)
        if each in self._prepared:
            remove(self._prepared[each][1])
        self._prepared[each] = (change, path)  # first, so that it is removed if it can't be written
        write(path, record, self._layout.mode)

    def catch_up(self) -> None:
        """Bring the files to the state of the index, after a process that could not."""
        with self._index.read() as db:
            if not stale(db, limit=1):
                return
        try:
            self.publish()
        finally:
            self.discard()
        self.settle()

    def settle(self, least: int = 1) -> None:
        """Remove the marks of files that are in their places, if there are at least so many."""
        if len(self._moved) >= least:
            with self._index.write() as db:
                self._unmark(db)

    def _unmark(self, db: Database) -> None:
        """Remove the marks of files that are in their places, unless the chunk was changed again."""
        if self._moved:
            db.conn.executemany("delete from stale where chunk_id = ? and change = ?", list(self._moved.items()))
            self._moved.clear()


def records_of(db: Database, ids: Sequence[str]) -> dict[str, Record]:
    """What the files of chunks must hold. Unknown ids are left out."""
    found: dict[str, Record] = {}
    for part in chunks.parts(ids):
        marks = chunks.placeholders(part)
        for row in db.query(f"select * from chunks where id in ({marks})", [*part]):
            found[row["id"]] = Record({**row, "pinned": bool(row["pinned"])})
        for table, rows in (("names", "names"), ("former_names", "former")):
            for row in db.query(f"select * from {table} where chunk_id in ({marks}) order by number", [*part]):
                owner = found.get(row.pop("chunk_id"))
                del row["namespace"]
                if owner is not None:  # it is, unless somebody else wrote the index
                    getattr(owner, rows).append(row)
    return found


def content(record: Record) -> bytes:
    """The bytes of a chunk's file: JSON that begins with the xxh3_128 of what follows it."""
    rest = _MIDDLE + canonical_json(vars(record)).encode() + b"}\n"
    return _START + xxhash.xxh3_128_hexdigest(rest).encode() + rest


def write(path: Path, record: Record, mode: int) -> None:
    """Write a chunk's file durably to a new path."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, mode)
        left = memoryview(content(record))
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, ident: str | None = None) -> Record:
    """Read and verify the file of the chunk with an id; None means that the file's name is the id.

    Raises:
        DamagedFile: it does not hold what was written, or is no file.
        OSError: it is missing or can't be read.
    """
    with opened(path) as (descriptor, size):
        if size > LIMIT_BYTES:
            raise DamagedFile(f"it has {size} bytes")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            data = file.read(size)
    rest = data[_DIGEST.stop :]
    if data[: _DIGEST.start] != _START or data[_DIGEST] != xxhash.xxh3_128_hexdigest(rest).encode():
        raise DamagedFile("its content does not match its digest")
    try:
        record = _parsed(json.loads(data)["chunk"])
        named = chunk_id(record.chunk["namespace"], record.chunk["level"], record.chunk["text"])
    except (ValueError, KeyError, TypeError, RecursionError, StoreCorruptError) as error:
        raise DamagedFile(f"its content can't be read ({type(error).__name__})") from None
    if not (ident or path.stem) == record.chunk["id"] == named:
        raise DamagedFile("its name is not the hash of its text")
    return record


def difference(path: Path, wanted: Record | None) -> str | None:
    """Why a chunk's file is not what it must be, None if it is. `wanted` is None if there must be no file."""
    try:
        found = read(path)
    except DamagedFile as error:
        return str(error)
    except FileNotFoundError:
        return "it is missing" if wanted else None
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    if wanted is None:
        return "its chunk is not in the index"
    return None if found == wanted else "it does not say what the index says"


def read_all(layout: Layout) -> Iterator[tuple[str, Record | DamagedFile]]:
    """Every chunk's id and its file's content, or what is wrong with it."""
    for each in layout.chunk_ids():
        try:
            yield each, read(layout.chunk(each))
        except DamagedFile as error:
            yield each, error
        except FileNotFoundError:
            continue


_CHUNK = {
    "id": str,
    "namespace": str,
    "level": int,
    "text": str,
    "metadata": str,
    "created": str,
    "number": int,
    "pinned": bool,
}
_NAME = {"name": str, "number": int, "since": str}


def _parsed(content: dict[str, Any]) -> Record:
    """Check what a file says. Its digest is right, so this only refuses what someone else wrote on purpose."""
    record = Record(**content)
    if not isinstance(record.names, list) or not isinstance(record.former, list):
        raise TypeError("names")
    for rows, types in (([record.chunk], _CHUNK), (record.names, _NAME), (record.former, {**_NAME, "until": str})):
        for row in rows:
            if {name: type(value) for name, value in row.items()} != types:
                raise TypeError("members")
            if not 0 <= row["number"] < 2**62:
                raise ValueError("number")
            for value in row.values():
                if isinstance(value, str):
                    value.encode()  # half a surrogate pair can't be kept
            for when in ("created", "since", "until"):
                datetime.fromisoformat(row.get(when, "2000-01-01"))
            chunks.check_name(row.get("name"))
    if not 0 <= record.chunk["level"] <= 2:
        raise ValueError("level")
    chunks.check_stored_metadata(record.chunk["id"], record.chunk["metadata"])
    return record


def stale(db: Database, *, after: str = "", limit: int = -1) -> dict[str, int]:
    """The chunks whose files may not be those of the index, with the change that marked each, in the order of ids."""
    query = "select chunk_id, change from stale where chunk_id > ? order by chunk_id limit ?"
    return dict(db.execute(query, [after, limit]).fetchall())


def _stale_by_batches(db: Database) -> Iterator[dict[str, int]]:
    after = ""
    while some := stale(db, after=after, limit=BATCH):
        yield some
        after = max(some)
