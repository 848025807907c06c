"""Bugs that the campaign must see. Each takes one precaution out of this process and of those that it forks."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlite_utils import Database

from braidsdk.store import blobs, catalogue, files, schema
from braidsdk.store.files import Layout
from braidsdk.store.index import Index


def _row_first() -> None:
    """Entries get their places after the commit that names them."""
    place, write = Layout.place, Index.write
    late: list[tuple[Any, ...]] = []

    @contextmanager
    def writing(self: Index) -> Iterator[Database]:
        with write(self) as db:
            yield db
        while late:
            place(*late.pop())

    def later(self: Layout, moves: Iterable[tuple[Path, Path]], removed: Iterable[Path] = ()) -> None:
        late.append((self, list(moves), list(removed)))

    Layout.place = later  # type: ignore[method-assign]
    Index.write = writing  # type: ignore[method-assign, assignment]


def _no_file_sync() -> None:
    blobs.os = catalogue.os = SimpleNamespace(**{**vars(os), "fsync": lambda descriptor: None})  # type: ignore[assignment]


def _no_folder_sync() -> None:
    files.sync_folder = lambda folder: None


def _no_digest() -> None:
    """The digest of an entry's tensors agrees with any."""

    class Agreeing(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __ne__(self, other: object) -> bool:
            return False

    parsed = blobs._parsed
    blobs._parsed = lambda *given: replace((header := parsed(*given)), payload=Agreeing(header.payload))


def _no_sync_after_commit() -> None:
    """SQLite does not sync the folder once the journal is gone."""
    schema.PRAGMAS = tuple(each.replace("=EXTRA", "=FULL") for each in schema.PRAGMAS)


PLANTED: dict[str, Callable[[], None]] = {
    "row-first": _row_first,
    "no-file-sync": _no_file_sync,
    "no-folder-sync": _no_folder_sync,
    "no-digest": _no_digest,
    "no-sync-after-commit": _no_sync_after_commit,
}
