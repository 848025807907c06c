"""Mends a store: makes its index and its files agree.

A sound index is the truth. A damaged one is moved to damaged/ and rebuilt from the files of chunks and entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from braidsdk.errors import StoreCorruptError, StoreReadOnlyError
from braidsdk.store import chunks, entries
from braidsdk.store.check import index_troubles
from braidsdk.store.files import Layout
from braidsdk.store.rebuild import Rebuilt
from braidsdk.store.store import ChunkStore


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        rebuilt: what the index was rebuilt from, None if it was sound.
        damaged: digest of each entry that was set aside, with the reason.
        written: id of each chunk whose file was written again or removed, with the reason.
        removed: digests of stray files that were removed.
        old_index: name of the damaged index in damaged/, None if there was none. The next deletion removes it, because
            it holds the texts of that time.
    """

    rebuilt: Rebuilt | None
    damaged: tuple[tuple[str, str], ...]
    written: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]
    old_index: str | None = None


def repair(path: str | Path, share: float = 0.0, on_progress: Callable[[int, int], None] | None = None) -> Repaired:
    """Mend the store in a folder. If its index is damaged, it is moved to damaged/, and rebuilt from the files. Takes
    the other arguments of `ChunkStore.check`.

    Raises:
        StorePathError, StoreVersionError, StoreReadOnlyError: as when the store is opened.
    """
    try:
        with ChunkStore(path) as opened:
            if not index_troubles(opened._index):
                return _mended(opened, share, on_progress)
            opened._index.check_writable()
    except StoreCorruptError:
        pass
    layout = Layout(Path(path).absolute())
    try:
        if layout.read_only:
            raise StoreReadOnlyError(
                f"The store at {layout.root} must be writable to be repaired; it can only be read. Copy it, and repair "
                "the copy."
            )
        old = layout.set_index_aside()
    finally:
        layout.close()
    with ChunkStore(path) as opened:
        return replace(_mended(opened, share, on_progress), old_index=old)


def _mended(opened: ChunkStore, share: float, on_progress: Callable[[int, int], None] | None) -> Repaired:
    """Set damaged entries aside, write chunks' files again, and remove strays. The index is sound."""
    opened._index.check_writable()
    layout, found = opened._layout, opened.check(share, on_progress)
    for digest, why in found.damaged:
        with opened._index.write() as db:
            if entries.known(db, [digest]):
                entries.delete_damaged(db, digest, file=layout.set_aside(layout.entry(digest)), why=why)
    with opened._changing(removes=True) as db:
        chunks.touch(db, [each for each, _ in found.behind])
    opened._collector.remove_entries(found.stray)
    return Repaired(opened.rebuilt, found.damaged, found.behind, found.stray)
