"""Mends a store: makes its index and its files agree.

A sound index is the truth. A damaged one is moved to damaged/ and rebuilt from the files of chunks and entries.
"""

import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from braidsdk.errors import (
    StoreError,
    StoreFullError,
    StorePathError,
    StoreReadOnlyError,
    StoreReplacedError,
    StoreVersionError,
)
from braidsdk.store import blobs, chunks, entries
from braidsdk.store.check import Checked
from braidsdk.store.files import Layout, index_files
from braidsdk.store.rebuild import Rebuilt, row_of
from braidsdk.store.schema import is_busy
from braidsdk.store.store import ChunkStore


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        rebuilt: what the index was rebuilt from, None if it was sound.
        damaged: digest of each entry that was set aside, with the reason.
        written: id of each chunk whose file was written again, with the reason. A chunk's file that the index does not
            know was moved to damaged/.
        taken_in: digests of stray files that are sound entries of registered chunks.
        removed: digests of other stray files.
        old_index: name of the damaged index in damaged/, None if there was none. The next deletion removes it, because
            it holds the texts of that time.
    """

    rebuilt: Rebuilt | None
    damaged: tuple[tuple[str, str], ...]
    written: tuple[tuple[str, str], ...]
    taken_in: tuple[str, ...]
    removed: tuple[str, ...]
    old_index: str | None = None


def repair(
    path: str | Path,
    share: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    index: str | Path | None = None,
) -> Repaired:
    """Mend the store in a folder. If its index is damaged, it is moved to damaged/, and rebuilt from the files. Takes
    the other arguments of `ChunkStore` and `ChunkStore.check`.

    Raises:
        StorePathError, StoreVersionError, StoreReadOnlyError: as when the store is opened.
    """
    try:
        with ChunkStore(path, index=index) as opened:
            opened._index.check_writable()
            found = opened.check(share, on_progress)
            if not found.index:
                return _mended(opened, found)
    except StoreError as error:
        layout = Layout(Path(path).absolute(), index)
        if not _is_damage(error, layout.home):
            layout.close()
            raise
    else:
        layout = Layout(Path(path).absolute(), index)
    try:
        if layout.read_only:
            raise StoreReadOnlyError(
                f"The store at {layout.root} must be writable to be repaired; it can only be read. Copy it, and repair "
                "the copy."
            )
        old = layout.set_index_aside()
    finally:
        layout.close()
    with ChunkStore(path, index=index) as opened:
        return replace(_mended(opened, opened.check()), old_index=old)


def _is_damage(error: StoreError, home: Path) -> bool:
    """Whether an error of opening or reading an index is a reason to rebuild it. The old one is kept, so that of a
    disk that failed for a moment is one too; that of a busy one, or of one that this process may not use, is not."""
    if isinstance(error, StoreVersionError | StoreReadOnlyError | StoreFullError | StoreReplacedError):
        return False
    if isinstance(error.__cause__, sqlite3.Error) and is_busy(error.__cause__):
        return False
    is_odd = any(os.path.lexists(path) and not _is_file(path) for path in index_files(home))
    return is_odd or not isinstance(error, StorePathError)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _mended(opened: ChunkStore, found: Checked) -> Repaired:
    """Set damaged entries aside, write chunks' files again, take strays in or remove them. The index is sound."""
    layout = opened._layout
    damaged = [each for each in found.damaged if _set_aside(opened, *each)]
    behind = [each for each, _ in found.behind]
    with opened._changing() as db:
        owners = chunks.owners(db, behind)
        for each in behind:
            if owners[each]:
                chunks.touch(db, [each])
            elif name := layout.set_aside(layout.chunk(each)):  # kept for some time, because it may be all that is left
                entries.record_damage(
                    db, each, namespace="", chunks=[each], file=name, why="no row of the index names it"
                )
    taken = [digest for digest in found.stray if _took_in(opened, digest)]
    removed = tuple(digest for digest in found.stray if digest not in taken)
    opened._collector.remove_entries(removed)
    return Repaired(opened.rebuilt, tuple(damaged), found.behind, tuple(taken), removed)


def _set_aside(opened: ChunkStore, digest: str, why: str) -> bool:
    """Set a damaged entry aside, unless it was deleted or computed again since it was looked at."""
    layout = opened._layout
    with opened._index.write() as db:
        row = db.execute("select payload_digest from entries where digest = ?", [digest]).fetchone()
        if row is None:
            return False
        with suppress(blobs.DamagedFile, OSError):
            if blobs.read(layout.entry(digest)).header.digest == row[0]:
                return False
        return entries.delete_damaged(db, digest, file=layout.set_aside(layout.entry(digest)), why=why)


def _took_in(opened: ChunkStore, digest: str) -> bool:
    """Add a stray file to the index, if it is a sound entry of registered chunks. That of a deleted chunk is not."""
    path = opened._layout.entry(digest)
    try:
        row = row_of(path, blobs.read(path).header, digest)
    except (blobs.DamagedFile, OSError):
        return False
    with opened._index.write() as db:
        if digest in entries.known(db, [digest]) or None in chunks.owners(db, row.chunks).values():
            return False
        entries.insert(db, [row])
    return True
