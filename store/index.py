"""The open index: one connection, one lock, and transactions that raise our own errors.

SQLite's rollback journal needs no shared memory, works on read-only media, and leaves no copy of deleted text. Its
readers and writers shut each other out for moments, and SQLite's own waiting is unfair then. So this module waits
itself: a short random time between two tries, and writers queue for a lock of their own before they ask SQLite.
"""

import contextlib
import fcntl
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlite_utils import Database

from braidsdk.errors import BraidError, ClosedError, StoreError, StoreReadOnlyError, StoreReplacedError
from braidsdk.store import troubles
from braidsdk.store.files import sync_folder
from braidsdk.store.schema import (
    BUSY_TIMEOUT_S,
    connected,
    corrupt,
    is_busy,
    is_damage,
    kind_of,
    migrated,
    primary,
    translate,
)

FAIR_S = 5.0
"""So long a writer queues. After that it asks SQLite all the same: the queue is only for fairness, and its lock may be
held by a fork of a process that was killed."""

PAUSE_S = (0.0002, 0.002)
"""The shortest and the longest time between two tries."""

T = TypeVar("T")


class Index:
    """A store's index. It is safe to use from several threads. Each process opens its own."""

    def __init__(self, path: Path, *, queue: Path, read_only: bool, first: Callable[[Database], None]) -> None:
        """Open the index.

        Args:
            path: the database's file. It exists, and may be empty.
            queue: the file whose lock writers queue for.
            read_only: whether nothing can be written.
            first: fills a new index, in the transaction that creates its tables.
        """
        self._path, self._queue, self._read_only = path, queue, read_only
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._writes = 0
        self._closed = False
        self._db: Database | None = None
        with self._translating():
            self._db = patiently(partial(migrated, path, read_only=read_only, first=first))
            self._inode = inode_of(path)

    @contextmanager
    def read(self) -> Iterator[Database]:
        """A transaction that sees one state of the index."""
        with self._transaction(_begin_reading) as db:
            yield db

    @contextmanager
    def write(self) -> Iterator[Database]:
        """A transaction that holds the store's only write lock from its start. It is undone if it raises.

        Raises:
            StoreReadOnlyError: the store can only be read.
        """
        self.check_writable()
        with self._lock:
            try:
                with self._in_turn(), self._transaction(_begin_writing) as db:
                    before = db.conn.total_changes
                    yield db
                    changed = db.conn.total_changes != before
                self._check_place()  # what was written to a file without a name is lost
                if not changed:
                    self._sync_found()
            finally:
                self._writes += 1

    def _sync_found(self) -> None:
        """Make what this process found durable: another may have written it, and died before it synced the folder."""
        try:
            sync_folder(self._path.parent)
        except OSError as error:
            raise kind_of(error)(
                f"What the store at {self._path.parent} holds could not be made durable: {error.strerror}. Correct "
                "what fails, and try again."
            ) from error

    def check_writable(self) -> None:
        """Raises:
        StoreReadOnlyError: the store can only be read.
        """
        if self._read_only:
            raise StoreReadOnlyError(
                f"The store at {self._path.parent} must be writable for this; it can only be read. Open it where it "
                "can be written, or use another store."
            )

    def version(self) -> tuple[int, int]:
        """A value that changes when anything may have been written, by this process or another. Unlike a transaction,
        this takes microseconds."""
        with self._lock:
            db = self._checked()
            with self._translating():
                (others,) = patiently(lambda: db.conn.execute("PRAGMA data_version").fetchone())
            return others, self._writes

    def close(self) -> None:
        """Close the connection. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._disconnect()

    @contextmanager
    def _transaction(self, begin: Callable[[Database], None]) -> Iterator[Database]:
        with self._lock:
            db = self._checked()
            with self._translating():
                try:
                    # Inside the try: Ctrl-C while this waits for the lock is only raised once it holds the lock.
                    patiently(partial(begin, db))
                    yield db
                    patiently(db.commit)
                except OSError as error:
                    raise kind_of(error)(
                        f"The files of the store at {self._path.parent} could not be changed: {error.strerror}. Free "
                        "some space or correct what fails. The store is as it was before."
                    ) from error
                finally:
                    _end(db)

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Queue with other processes' writers."""
        try:
            descriptor = os.open(self._queue, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            yield  # SQLite says what is wrong, if anything is
            return
        try:
            deadline = time.monotonic() + FAIR_S
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    _pause()
                except OSError:
                    break
            yield
        finally:
            os.close(descriptor)

    def _checked(self) -> Database:
        """The connection. After an error that may have left it in any state there is a new one."""
        if self._closed:
            raise ClosedError("The store must be open; it was closed. Open it again.")
        if self._process != os.getpid():
            raise StoreError(
                "A store must be used in the process that opened it; got a fork of that process. Open the store "
                "again in the new process."
            )
        self._check_place()
        if self._db is None:
            with self._translating():
                self._db = patiently(partial(connected, self._path, read_only=self._read_only))
        return self._db

    def _check_place(self) -> None:
        """Check that the index is still where it was. Its inode is not used again while it is open."""
        if inode_of(self._path) != self._inode:
            raise StoreReplacedError(
                f"The store at {self._path.parent} must stay in its place while it is open; it was removed or "
                "replaced. Nothing was kept. Open the store again."
            )

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None and self._process == os.getpid():
            with contextlib.suppress(sqlite3.Error):
                db.close()

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Raise our own errors for those of SQLite, and for those of Python where a row is not what it must be."""
        try:
            yield
        except BraidError:
            raise
        except sqlite3.Error as error:
            raise self._translated(error) from error
        except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            self._disconnect()
            found = self._trouble()
            if found is None:
                raise  # the index is sound, so this is our own mistake
            raise corrupt(self._path, found) from error

    def _translated(self, error: sqlite3.Error) -> StoreError:
        """Our own error for one of SQLite's. Damage is only claimed after a second look."""
        if is_damage(error) or primary(error) == sqlite3.SQLITE_IOERR:
            self._disconnect()
        if is_damage(error) and self._trouble() is None:
            return StoreError(
                f"The index {self._path} could not be read for a moment ({error}); it is sound. The store is as it was "
                "before. Try again. If it fails again, look at what the disk reports."
            )
        return translate(error, self._path)

    def _trouble(self) -> str | None:
        """Read the whole index over a new connection, and say what is wrong with it. A file of a database must not be
        read in any other way: closing it would end the locks of this process."""
        try:
            with closing(patiently(partial(connected, self._path, read_only=self._read_only))) as db:
                found = patiently(lambda: troubles.of_index(db, 1))
        except sqlite3.Error as error:
            if not is_damage(error):
                return None
            return str(error) if primary(error) else "it has text that is not UTF-8"
        except UnicodeDecodeError:
            return "it has text that is not UTF-8"  # so has SQLite's message about it
        return found[0] if found else None


def patiently(work: Callable[[], T]) -> T:
    """Do something as soon as other processes let the index be used.

    Raises:
        sqlite3.Error: it failed, or the index was not free within `BUSY_TIMEOUT_S`.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return work()
        except sqlite3.Error as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
        _pause()


def inode_of(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one that takes its path, as long as it is open. None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _pause() -> None:
    time.sleep(random.uniform(*PAUSE_S))


def _begin_reading(db: Database) -> None:
    """Begin a transaction and take its lock, which SQLite would only take with the first statement."""
    db.conn.execute("BEGIN")
    try:
        db.conn.execute("select 1 from sqlite_schema limit 1").fetchone()
    except sqlite3.Error:
        db.rollback()
        raise


def _begin_writing(db: Database) -> None:
    db.conn.execute("BEGIN IMMEDIATE")


def _end(db: Database) -> None:
    """Undo a transaction that is still open, even if that is interrupted several times. An open transaction would lock
    every other process out."""
    interrupt = None
    while db.conn.in_transaction:
        try:
            db.rollback()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt:
        raise interrupt
