"""Looks at everything that a store holds, and says what is wrong. `check` changes nothing, and `repair` mends it."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from braidsdk.errors import StoreCorruptError
from braidsdk.store import blobs, catalogue, chunks, entries, troubles
from braidsdk.store.chunks import ChunkFilter
from braidsdk.store.entries import EntryRow
from braidsdk.store.files import Layout
from braidsdk.store.index import Index
from braidsdk.store.rebuild import row_of

PAGE = 1_000
"""Texts that are in memory at a time."""


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        entries: entries that the index names.
        read: entries of which every byte was read; of all others only the header was.
        index: what is wrong with the index, in words.
        damaged: digest of each entry whose file is missing or not what was written, with the reason.
        stray: digests of files that no row of the index names, from processes that were killed. Opening the store
            removes them within a day.
        chunks: chunks that the index names.
        behind: id of each chunk whose file is missing, damaged, or does not say what the index says, with the reason,
            and of each file without a chunk. The texts in the index are sound, and `repair` writes the files again.
    """

    entries: int
    read: int
    index: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    stray: tuple[str, ...]
    chunks: int
    behind: tuple[tuple[str, str], ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.index and not self.damaged and not self.behind


def check(index: Index, layout: Layout, share: float, on_progress: Callable[[int, int], None] | None = None) -> Checked:
    """Check the index, the texts and the entries.

    Args:
        index: the open index.
        layout: the store's folders.
        share: of how many entries every byte is read, from 0 to 1; which ones is random.
        on_progress: called with how many entries were looked at, and how many there are.
    """
    there = list(layout.digests())  # before the rows are read, so that it lacks what is published from now on
    with index.read() as db:
        rows = dict(db.execute("select digest, payload_digest from entries").fetchall())
        count = db.table("chunks").count
    found = index_troubles(index)
    damaged, read = [], 0
    wrong: list[str] = []
    for number, (digest, payload) in enumerate(rows.items(), 1):
        whole = random.random() < share
        file = _entry(layout, digest, payload, whole=whole)
        with index.read() as db:
            now = db.execute("select payload_digest from entries where digest = ?", [digest]).fetchone()
            if now != (payload,):
                pass  # it was deleted or computed again since
            elif isinstance(file, str):
                damaged.append((digest, file))
            elif not found and entries.of_digest(db, digest) != file:
                wrong.append(f"the row of entry {digest} does not say what its file says")
        read += whole
        if on_progress:
            on_progress(number, len(rows))
    stray = [each for each in there if each not in rows and not blobs.is_of_another_format(layout.entry(each))]
    found += wrong[:5]
    behind = tuple(behind_index(index, layout)) if not found else ()
    return Checked(len(rows), read, tuple(found), tuple(damaged), tuple(stray), count, behind)


def index_troubles(index: Index) -> list[str]:
    """What is wrong with the index and the texts in it, in words."""
    with index.read() as db:
        found = troubles.of_index(db)
        namespaces = [row[0] for row in db.execute("select distinct namespace from chunks")]
        held = db.execute("select namespace, count(*), sum(size) from entries group by namespace").fetchall()
        counted = {name: total for name, total in entries.totals(db).items() if total != (0, 0)}
    if counted != {row[0]: (row[1], row[2]) for row in held}:
        found.append("the totals of its entries are not their sums")
    return found + [trouble for namespace in namespaces for trouble in _texts(index, namespace)]


def behind_index(index: Index, layout: Layout) -> Iterator[tuple[str, str]]:
    """The chunks whose files do not say what the index says, with the reason."""
    found = dict.fromkeys(layout.chunk_ids())
    with index.read() as db:
        found |= dict.fromkeys(row[0] for row in db.execute("select id from chunks"))
    ids = list(found)
    for start in range(0, len(ids), PAGE):
        some = ids[start : start + PAGE]
        with index.read() as db:  # nobody commits meanwhile, and what is committed is marked until its file is moved
            stale = catalogue.stale(db)
            records = catalogue.records_of(db, some)
            for each in some:
                why = catalogue.difference(layout.chunk(each), records.get(each))
                if why and each not in stale:
                    yield each, why


def _texts(index: Index, namespace: str) -> Iterator[str]:
    """What is wrong with the texts of a namespace; each is compared with its id when it is read."""
    after = None
    while True:
        try:
            with index.read() as db:
                rows = chunks.select(db, namespace, ChunkFilter(), limit=PAGE, after=after)
        except StoreCorruptError as error:
            yield str(error)
            return
        if not rows:
            return
        after = rows[-1].id


def _entry(layout: Layout, digest: str, payload: str, *, whole: bool) -> EntryRow | str:
    """What an entry's file says, or what is wrong with it."""
    try:
        path = layout.entry(digest)
        header = blobs.read(path).header if whole else blobs.read_header(path)
        if header.digest != payload:
            return "it is not the file that the index names"
        return row_of(path, header, digest)
    except (StoreCorruptError, blobs.DamagedFile) as error:
        return str(error)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it can't be read: {error.strerror}"
