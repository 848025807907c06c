"""Defines the index's tables and opens its database.

Migrations are append-only: a migration that has shipped is never edited, and a change is a new function at the end.
Each migration runs in one transaction with the record of it, so several processes may open a new store at the same
time.

The index can be rebuilt from the entries' files (see `rebuild.py`), except names, metadata and chunks without an entry.
"""

import sqlite3
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from sqlite_utils import Database
from sqlite_utils.db import ForeignKey
from sqlite_utils.migrations import Migrations

from braidsdk.errors import StoreCorruptError, StoreError, StoreFullError, StorePathError, StoreVersionError

BUSY_TIMEOUT_S = 30.0

METADATA_INDEX = "idx_chunks_namespace_metadata"

MODELS_INDEX = "idx_entries_model"

migrations = Migrations("braidsdk-store")


@migrations()
def m001_initial(db: Database) -> None:
    """Chunks with their names, entries with the chunks that each one saw, and what was set aside as damaged."""
    db.table("chunks").create(
        {"number": int, "id": str, "namespace": str, "level": int, "text": str, "metadata": str, "created": str},
        pk="number",  # registration order; an explicit one, because VACUUM may renumber rows without
        not_null=["id", "namespace", "level", "text", "metadata", "created"],
    )
    db.table("chunks").create_index(["id"], unique=True)
    db.table("chunks").create_index(["namespace", "number"])
    db.table("names").create(
        {"number": int, "namespace": str, "name": str, "chunk_id": str},
        pk="number",
        not_null=["namespace", "name", "chunk_id"],
        foreign_keys=[ForeignKey("names", "chunk_id", "chunks", "id", on_delete="CASCADE")],
    )
    db.table("names").create_index(["namespace", "name"], unique=True)
    db.table("names").create_index(["chunk_id"])
    db.table("entries").create(
        {
            "digest": str,
            "chunk_id": str,  # null: the bare prompt header
            "record": str,  # canonical JSON of the key, without the token ids
            "tokens_sha256": str,
            "tokens": int,
            "bytes": int,
            "file": str,  # relative to the store
            "payload_digest": str,
            "created": str,
        },
        pk="digest",
        not_null=["record", "tokens_sha256", "tokens", "bytes", "file", "payload_digest", "created"],
        foreign_keys=[ForeignKey("entries", "chunk_id", "chunks", "id")],
    )
    db.table("entries").create_index(["chunk_id"])
    db.table("entries").create_index(["tokens_sha256"])
    db.table("entry_chunks").create(
        {"digest": str, "chunk_id": str},  # no key to chunks: a rebuilt index may know an entry's anchor by id alone
        pk=("digest", "chunk_id"),
        foreign_keys=[ForeignKey("entry_chunks", "digest", "entries", "digest", on_delete="CASCADE")],
    )
    db.table("entry_chunks").create_index(["chunk_id"])
    db.table("damage").create(
        {"number": int, "digest": str, "chunks": str, "file": str, "why": str, "created": str},
        pk="number",
        not_null=["digest", "chunks", "why", "created"],
    )
    db.table("damage").create_index(["digest"])


@migrations()
def m002_filters_and_memory(db: Database) -> None:
    """Indexes for lists, counts and statistics that read no text; and what processes remember for later ones."""
    db.table("chunks").create_index(["namespace", "level"])  # every index ends with the row's number
    db.execute(f"create index {METADATA_INDEX} on chunks (namespace, metadata) where metadata <> '{{}}'")
    for name, kind, path in (("weights", str, "model.weights"), ("dtype", str, "model.dtype"), ("level", int, "level")):
        db.table("entries").add_column(name, kind)  # copied from `record`, for statistics
        db.execute(f"update entries set {name} = json_extract(record, '$.{path}')")
    db.table("entries").create_index(["weights", "dtype", "level", "bytes"], index_name=MODELS_INDEX)
    db.table("memory").create({"key": str, "value": str}, pk="key", not_null=["value"])


def open_index(path: Path, *, first: Callable[[Database], None]) -> Database:
    """Open or create the index, bring it up to date, and return it.

    Args:
        path: the database's file.
        first: called once, in the transaction that creates the tables of a new index.

    Raises:
        StoreVersionError: it has a migration that this version does not know.
        StorePathError: its file system can't hold a database that several processes share.
        sqlite3.Error: it can't be opened, or is damaged.
    """
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        # The user's plugins for sqlite-utils must not change our index.
        db = Database(connection, execute_plugins=False)
        if _write_ahead(connection) != "wal":
            raise StorePathError(
                f"The store's file system must support SQLite's WAL mode; the one of {path.parent} does not. It may be "
                "a network share. Put the store on a local disk."
            )
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        _migrate(db, first)
    except BaseException:
        connection.close()
        raise
    return db


def _write_ahead(connection: sqlite3.Connection) -> str:
    # Two processes that both switch a new database to WAL may get "locked" before the busy timeout has passed.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode=WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _migrate(db: Database, first: Callable[[Database], None]) -> None:
    _refuse_unknown(db)
    if not migrations.pending(db):
        return
    db.conn.execute("BEGIN IMMEDIATE")
    try:
        _refuse_unknown(db)  # again, because another process may have been quicker
        new = not migrations.applied(db)
        migrations.apply(db)
        if new:
            first(db)
    except BaseException:
        db.rollback()
        raise
    db.commit()


def _refuse_unknown(db: Database) -> None:
    unknown = sorted(m.name for m in migrations.applied(db) if m.name not in _known())
    if unknown:
        raise StoreVersionError(
            f"The store must be of this version or an older one; got one with the newer migrations "
            f"{', '.join(unknown)}. Update braidsdk, or open another store."
        )


@cache
def _known() -> frozenset[str]:
    with Database(memory=True, execute_plugins=False) as empty:
        return frozenset(m.name for m in migrations.pending(empty))


def translate(error: sqlite3.Error, index: Path) -> StoreError:
    """Return our own error that tells the user what an error of SQLite means."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreCorruptError(
            f"The index at {index} must be intact; it is damaged ({error}). Move {index.name}, {index.name}-wal and "
            f"{index.name}-shm aside: the next open rebuilds the index from the entries, which stay as they are. "
            "Register names, metadata and chunks without an entry again."
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return StorePathError(
            f"The index at {index} must be writable; got: {error}. Choose another path or correct its permissions."
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
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
