"""Defines the index's tables and opens its database.

Migrations are append-only: a migration that has shipped is never edited, and a change is a new function at the end.
Each migration runs in one transaction with the record of it, so several processes may open a new store at the same
time.

The index can be rebuilt from the files of chunks and entries (see `rebuild.py`).
"""

import errno
import os
import sqlite3
from collections.abc import Callable
from functools import cache
from pathlib import Path

from sqlite_utils import Database
from sqlite_utils.db import ForeignKey
from sqlite_utils.migrations import Migrations

from braidsdk.errors import StoreCorruptError, StoreError, StoreFullError, StorePathError, StoreVersionError
from braidsdk.store.files import REPAIR

BUSY_TIMEOUT_S = 30.0

PRAGMAS = (
    "journal_mode=DELETE",
    "synchronous=EXTRA",  # the folder is synced once the journal is gone, so a commit can't be undone by a power cut
    "secure_delete=ON",
    "foreign_keys=ON",
    "trusted_schema=OFF",
    "temp_store=MEMORY",
)

_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
"""With it SQLite's journals begin, and end if they name a journal of several databases."""

METADATA_INDEX = "idx_chunks_namespace_metadata"

MODELS_INDEX = "idx_entries_model"

ID_INDEX = "idx_chunks_id_namespace"
"""It tells an id of another namespace from none without the chunk's row, so that both take as long."""

migrations = Migrations("braidsdk-store")


@migrations()
def m001_tables(db: Database) -> None:
    """Chunks with their names now and before, entries with the chunks that each one saw, what was set aside as damaged,
    and what processes remember for later ones."""
    db.table("chunks").create(
        {
            "number": int,  # registration order; an explicit one, because VACUUM may renumber rows without
            "id": str,
            "namespace": str,
            "level": int,
            "text": str,
            "metadata": str,
            "created": str,
            "pinned": int,
        },
        pk="number",
        not_null=["id", "namespace", "level", "text", "metadata", "created", "pinned"],
        defaults={"pinned": 0},
        strict=True,
    )
    db.table("chunks").create_index(["id"], unique=True)
    db.table("chunks").create_index(["id", "namespace"], index_name=ID_INDEX)
    db.table("chunks").create_index(["namespace", "number"])
    db.execute("create index idx_chunks_pinned on chunks (id) where pinned")
    db.table("chunks").create_index(["namespace", "level"])  # every index ends with the row's number
    db.execute(f"create index {METADATA_INDEX} on chunks (namespace, metadata) where metadata <> '{{}}'")
    db.table("names").create(
        {"number": int, "namespace": str, "name": str, "chunk_id": str, "since": str},
        pk="number",  # the later of two claims to a name has the higher one
        not_null=["namespace", "name", "chunk_id", "since"],
        foreign_keys=[ForeignKey("names", "chunk_id", "chunks", "id", on_delete="CASCADE")],
        strict=True,
    )
    db.table("names").create_index(["namespace", "name"], unique=True)
    db.table("names").create_index(["chunk_id"])
    db.table("former_names").create(
        {"number": int, "namespace": str, "name": str, "chunk_id": str, "since": str, "until": str},
        pk="number",  # the order in which they ended
        not_null=["namespace", "name", "chunk_id", "since", "until"],
        foreign_keys=[ForeignKey("former_names", "chunk_id", "chunks", "id", on_delete="CASCADE")],
        strict=True,
    )
    db.table("former_names").create_index(["namespace", "name", "number"])
    db.table("former_names").create_index(["chunk_id"])
    db.table("stale").create(  # chunks whose files may be behind the index; see catalogue.py
        {"chunk_id": str, "change": int}, pk="chunk_id", not_null=["chunk_id", "change"], strict=True
    )
    db.table("entries").create(
        {
            "digest": str,
            "namespace": str,
            "chunk_id": str,  # null: the bare prompt header, or an overlay
            "record": str,  # canonical JSON of the key, without the token ids
            "tokens_sha256": str,
            "weights": str,  # these three are copied from the record, for statistics
            "dtype": str,
            "level": int,
            "tokens": int,
            "bytes": int,
            "size": int,  # of its file, in bytes
            "worth": float,  # the least is evicted first; see entries.py
            "used": int,  # when it was used last, in seconds since 1970
            "payload_digest": str,
            "file": str,  # relative to the store; for people, nothing reads it
            "created": str,
        },
        pk="digest",
        not_null=[
            *("namespace", "record", "tokens_sha256", "weights", "dtype", "level"),
            *("tokens", "bytes", "size", "worth", "used", "payload_digest", "file", "created"),
        ],
        foreign_keys=[ForeignKey("entries", "chunk_id", "chunks", "id")],
        strict=True,
    )
    db.table("entries").create_index(["chunk_id", "namespace"])
    db.table("entries").create_index(["tokens_sha256", "namespace"])
    columns = ["namespace", "weights", "dtype", "level", "bytes"]
    db.table("entries").create_index(columns, index_name=MODELS_INDEX)
    db.table("entries").create_index(["worth"])
    db.table("entries").create_index(["namespace", "worth"])
    db.table("entries").create_index(["used"])
    db.table("totals").create(  # of entries and their files, so that a limit is compared at once
        {"namespace": str, "entries": int, "size": int},
        pk="namespace",
        not_null=["namespace", "entries", "size"],
        strict=True,
    )
    db.table("entry_chunks").create(
        {"digest": str, "chunk_id": str},  # no key to chunks: a rebuilt index may know an entry's anchor by id alone
        pk=("digest", "chunk_id"),
        not_null=["digest", "chunk_id"],
        foreign_keys=[ForeignKey("entry_chunks", "digest", "entries", "digest", on_delete="CASCADE")],
        strict=True,
    )
    db.table("entry_chunks").create_index(["chunk_id"])
    db.table("damage").create(
        {"number": int, "digest": str, "namespace": str, "chunks": str, "file": str, "why": str, "created": str},
        pk="number",
        not_null=["digest", "namespace", "chunks", "why", "created"],
        defaults={"namespace": ""},  # that of a file whose namespace is not known
        strict=True,
    )
    db.table("damage").create_index(["digest"])
    db.table("damage").create_index(["namespace"])
    db.table("memory").create({"key": str, "value": str}, pk="key", not_null=["value"], strict=True)


def connected(path: Path, *, read_only: bool) -> Database:
    """A connection to an index that exists.

    Raises:
        StorePathError: it is a link.
        StoreCorruptError: its journal names another file.
        sqlite3.Error: it can't be opened.
    """
    if path.is_symlink():  # to an index of somebody else, perhaps
        raise StorePathError(
            f"The index at {path} must be a file of its own; it is a link. Put the file that it leads to in its place, "
            "or remove the link: the next open rebuilds the index from the entries."
        )
    _refuse_foreign_journal(path)
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
    connection = sqlite3.connect(uri, uri=True, timeout=0, check_same_thread=False)
    try:
        # The user's plugins for sqlite-utils must not change our index.
        db = Database(connection, execute_plugins=False)
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        connection.close()
        raise
    return db


def _refuse_foreign_journal(index: Path) -> None:
    """A journal may name a journal of several databases, and SQLite deletes that file with it, wherever it lies. Ours
    never do: a connection has one database.

    Raises:
        StoreCorruptError: it names one.
    """
    journal = index.with_name(f"{index.name}-journal")
    try:
        descriptor = os.open(journal, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # there is none, or SQLite says what is wrong with it
    try:
        size = os.fstat(descriptor).st_size
        end = os.pread(descriptor, 8, max(size - 8, 0))
    except OSError:
        return
    finally:
        os.close(descriptor)
    if size >= 16 and end == _JOURNAL_MAGIC:
        raise StoreCorruptError(
            f"The journal of the index at {index} must name no other file, as those of this store never do; it names "
            f"one. Move {index.name} and {journal.name} aside: the next open rebuilds the index from the entries, "
            "which stay as they are."
        )


def migrated(path: Path, *, read_only: bool, first: Callable[[Database], None]) -> Database:
    """Open an index that exists, bring it up to date unless it can only be read, and return it.

    Args:
        path: the database's file; an empty one is a new index.
        read_only: whether nothing can be written.
        first: called once, in the transaction that creates the tables of a new index.

    Raises:
        StoreVersionError: it has migrations that this version does not know, or, if it can only be read, lacks some.
        StoreCorruptError: its tables are not those that the migrations make.
        sqlite3.Error: it can't be opened, or is damaged.
    """
    db = connected(path, read_only=read_only)
    try:
        _refuse_unknown(db)
        if migrations.pending(db):
            if read_only:
                raise StoreVersionError(
                    f"The store at {path.parent} must be of this version, because it can only be read; got an older or "
                    "an empty one. Open it once where it can be written."
                )
            _migrate(db, first)
        if _tables(db) != _expected():
            raise StoreCorruptError(
                f"The index at {path} must have the tables that this version makes; it has others. {REPAIR}"
            )
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: Database, first: Callable[[Database], None]) -> None:
    db.conn.execute("PRAGMA auto_vacuum=INCREMENTAL")  # has an effect before the first table only
    db.conn.execute("BEGIN IMMEDIATE")
    try:
        _refuse_unknown(db)  # again, because another process may have been quicker
        new = not migrations.applied(db)
        migrations.apply(db)
        if new:
            first(db)
        db.commit()
    except BaseException:
        db.rollback()
        raise


def _refuse_unknown(db: Database) -> None:
    unknown = sorted(m.name for m in migrations.applied(db) if m.name not in _known())
    if unknown:
        raise StoreVersionError(
            f"The store must be of this version or an older release; got one with the migrations {', '.join(unknown)}: "
            "a newer version wrote it, or one before the first release. Update braidsdk, or open another store."
        )


def _tables(db: Database) -> set[tuple[str, str, str]]:
    """Everything in the schema, as SQL. A trigger or a view would run statements of whoever wrote the index."""
    return {(row[0], row[1], row[2] or "") for row in db.execute("select type, name, sql from sqlite_schema")}


@cache
def _expected() -> frozenset[tuple[str, str, str]]:
    with Database(memory=True, execute_plugins=False) as empty:
        migrations.apply(empty)
        return frozenset(_tables(empty))


@cache
def _known() -> frozenset[str]:
    with Database(memory=True, execute_plugins=False) as empty:
        return frozenset(m.name for m in migrations.pending(empty))


def primary(error: sqlite3.Error) -> int:
    """SQLite's primary error code; 0 if it has none."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another process uses the index, so that a later try may succeed."""
    return primary(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the index does not hold what SQLite or this store wrote."""
    return primary(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) or "decode to UTF-8" in str(error)


def kind_of(error: OSError) -> type[StoreError]:
    """Return the type of our own error for a write that failed."""
    return StoreFullError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else StoreError


def corrupt(index: Path, why: str) -> StoreCorruptError:
    """The error that tells the user that the index is damaged."""
    return StoreCorruptError(f"The index at {index} must be intact; it is damaged ({why}). {REPAIR}")


def translate(error: sqlite3.Error, index: Path) -> StoreError:
    """Return our own error that tells the user what an error of SQLite means."""
    code = primary(error)
    if is_damage(error):
        return corrupt(index, str(error))
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return StorePathError(
            f"The index at {index} must be writable; got: {error}. Choose another path or correct its permissions."
        )
    if is_busy(error):
        return StoreError(
            f"The index {index} must be free within {BUSY_TIMEOUT_S:.0f} s; another process holds it. Try again, or "
            "end that process."
        )
    if code == sqlite3.SQLITE_FULL:
        return StoreFullError(f"The disk of {index} is full. Free some space. The store is as it was before.")
    return StoreError(
        f"The index {index} could not be used: {error}. The store is as it was before. Try again. If it fails again, "
        "correct what the disk reports."
    )
