"""The open index: one connection, one lock, and transactions that raise our own errors."""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlite_utils import Database

from braidsdk.errors import ClosedError, StoreError
from braidsdk.store.schema import open_index, translate


class Index:
    """A store's index. It is safe to use from several threads. Each process opens its own."""

    def __init__(self, path: Path, *, first: Callable[[Database], None]) -> None:
        """Open or create the index. `first` fills a new one, in the transaction that creates it."""
        self._path = path
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._writes = 0
        self._db: Database | None = None
        try:
            self._db = open_index(path, first=first)
        except sqlite3.Error as error:
            raise translate(error, path) from error

    @contextmanager
    def read(self) -> Iterator[Database]:
        """A transaction that sees one state of the index."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def write(self) -> Iterator[Database]:
        """A transaction that holds the store's only write lock from its start. It is undone if it raises."""
        with self._lock:
            try:
                with self._transaction("BEGIN IMMEDIATE") as db:
                    yield db
            finally:
                self._writes += 1

    def version(self) -> tuple[int, int]:
        """A value that changes when anything may have been written, by this process or another. Unlike a transaction,
        this takes microseconds."""
        with self._lock:
            db = self._checked()
            try:
                (others,) = db.conn.execute("PRAGMA data_version").fetchone()
            except sqlite3.Error as error:
                raise translate(error, self._path) from error
            return others, self._writes

    def close(self) -> None:
        """Close the connection. Safe to call twice."""
        with self._lock:
            if self._db is not None and self._process == os.getpid():
                self._db.close()
            self._db = None

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Database]:
        with self._lock:
            db = self._checked()
            try:
                try:
                    # Inside the try: Ctrl-C while this waits for the lock is only raised once it holds the lock.
                    db.conn.execute(begin)
                    yield db
                    db.commit()
                finally:
                    _end(db)
            except sqlite3.Error as error:
                raise translate(error, self._path) from error
            except OSError as error:
                raise StoreError(
                    f"The files of the store at {self._path.parent} could not be changed: {error.strerror}. Free some "
                    "space or correct what fails. The store is as it was before."
                ) from error

    def _checked(self) -> Database:
        if self._db is None:
            raise ClosedError("The store must be open; it was closed. Open it again.")
        if self._process != os.getpid():
            raise StoreError(
                "A store must be used in the process that opened it; got a fork of that process. Open the store "
                "again in the new process."
            )
        return self._db


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
