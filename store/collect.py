"""Keeps a store within its limits, and removes what killed processes left.

Only KV entries are evicted, never texts: an evicted entry is computed again when it is asked for. Entries of pinned
chunks stay, and so do those that a process reads at the moment.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from sqlite_utils import Database

from braidsdk.errors import StoreError, StoreFullError
from braidsdk.store import blobs, entries, limits, memory
from braidsdk.store.claims import Evicting, Leases
from braidsdk.store.files import Layout
from braidsdk.store.index import Index
from braidsdk.store.limits import WHOLE, Limit

_log = logging.getLogger(__name__)

SWEEP_EVERY_S = 24 * 3600.0
"""The shortest time between two sweeps of a store's entries, whichever processes open it."""

SWEPT = "swept"
"""The key under which the store remembers when the last sweep began, in seconds since 1970."""

DAMAGED_S = 30 * 24 * 3600.0
"""Files that were set aside stay this long, for whoever wants to know what happened to them."""

BATCH = 256
"""The most entries that are evicted in one transaction."""

T = TypeVar("T")


@dataclass(frozen=True)
class Collected:
    """What a collection removed.

    Attributes:
        evicted: how many entries, to keep the limits.
        evicted_bytes: size of their files.
        strays: how many entries' files that no row named.
        damaged: how many old files that had been set aside.
        over_bytes: by how much the store, or the namespace furthest over its limit, is still too large, because what is
            left is pinned or in use.
    """

    evicted: int = 0
    evicted_bytes: int = 0
    strays: int = 0
    damaged: int = 0
    over_bytes: int = 0


class Collector:
    """Evicts and sweeps in one open store."""

    def __init__(self, index: Index, layout: Layout, leases: Leases) -> None:
        self._index, self._layout, self._leases = index, layout, leases

    def collect(self, *, damaged_s: float = DAMAGED_S) -> Collected:
        """Evict what is over the limits or too old, and remove strays, temporaries, and what was set aside longer than
        `damaged_s` seconds ago."""
        return self._sweep(self.evict(by_age=True), damaged_s)

    def _sweep(self, evicted: Collected, damaged_s: float) -> Collected:
        self._layout.sweep_temporaries()
        strays = self.sweep_entries()
        damaged = self._layout.sweep_damaged(time.time() - damaged_s)
        with self._index.write() as db:
            db.execute("PRAGMA incremental_vacuum").fetchall()
        return replace(evicted, strays=strays, damaged=damaged)

    def sweep_if_due(self) -> None:
        """Remove what killed processes left and what is too old, once a day, whichever processes open the store."""
        self._layout.sweep_temporaries()
        if self._claim_sweep():
            try:
                evicted = self.evict(by_age=True)
            except StoreFullError:
                raise
            except StoreError as error:
                _log.warning("nothing is evicted: %s", error)
                evicted = Collected()
            self._sweep(evicted, DAMAGED_S)

    def evict(self, spared: Collection[str] = (), *, by_age: bool = False) -> Collected:
        """Evict entries until all limits are kept, the least worth first.

        Args:
            spared: digests of entries that were stored just now. They go last, and one of them stays.
            by_age: evicts those that are too old as well.
        """
        found = limits.read(self._layout)
        count = size = over = 0
        while found:
            with self._leases.evicting() as taken:
                gone, over = self.freeing(partial(self._delete_some, found, taken, spared, by_age))
                self.remove_entries(list(gone))
            count, size = count + len(gone), size + sum(gone.values())
            if len(gone) < BATCH:
                break
        return Collected(count, size, over_bytes=over)

    def _delete_some(
        self, found: Mapping[str, Limit], taken: Evicting, spared: Collection[str], by_age: bool
    ) -> tuple[dict[str, int], int]:
        """Delete the rows of at most `BATCH` entries. Returns their digests with the sizes of their files, and by how
        many bytes a limit is exceeded still."""
        gone: dict[str, tuple[str, int]] = {}
        over = 0
        with self._index.write() as db:
            totals = entries.totals(db)
            for name in sorted(found, key=lambda name: name == WHOLE):  # the whole store comes last
                limit, namespace = found[name], None if name == WHOLE else name
                if by_age and limit.max_age_s is not None:
                    before = int(time.time() - limit.max_age_s)
                    _take(entries.evictable(db, namespace, unused_since=before), taken, gone)
                if limit.max_bytes is not None:
                    held = sum(size for each, (_, size) in totals.items() if namespace in (None, each))
                    held -= sum(size for each, size in gone.values() if namespace in (None, each))
                    rows = _last(entries.evictable(db, namespace), spared)
                    over = max(over, _take(rows, taken, gone, held - limit.max_bytes))
            entries.delete(db, list(gone))
        return {digest: size for digest, (_, size) in gone.items()}, over

    def freeing(self, work: Callable[[], T]) -> T:
        """Do something that frees space, even if the disk is full: then the reserve is used."""
        try:
            return work()
        except StoreFullError:
            if not self._layout.use_reserve():
                raise
            return work()
        finally:
            self._layout.keep_reserve()

    def remove_entries(self, digests: Collection[str], aside: Collection[str] | None = None) -> None:
        """Delete the files of entries that have no row, under the lock that publishing takes; with `aside`, also files
        that were set aside under these names."""
        if not digests and aside is None:
            return
        with self._index.write() as db:
            kept = entries.known(db, digests)
            self._layout.remove_entries(digest for digest in digests if digest not in kept)
            if aside is not None:
                self._layout.remove_damaged(aside)

    def sweep_entries(self) -> int:
        """Remove files that no row names, and return how many. A process was killed before it wrote the row, or after
        it deleted the row."""
        there = list(self._layout.digests())  # read before the rows, so that it lacks what is published from now on
        with self._index.read() as db:
            kept = entries.all_digests(db)
        paths = {digest: self._layout.entry(digest) for digest in there if digest not in kept}
        stray = [digest for digest, path in paths.items() if not blobs.is_of_another_format(path)]
        self.remove_entries(stray)
        return len(stray)

    def _claim_sweep(self) -> bool:
        """Whether a sweep is due. If so, this process does it, and no other one does for `SWEEP_EVERY_S`."""
        with self._index.read() as db:  # first, because usually none is due and no write lock is needed
            if not _is_due(db):
                return False
        with self._index.write() as db:
            due = _is_due(db)  # again, because another process may have been quicker
            if due:
                memory.remember(db, {SWEPT: str(time.time())})
        return due


def _take(
    rows: Iterable[tuple[str, str, int]], taken: Evicting, gone: dict[str, tuple[str, int]], enough: float = math.inf
) -> int:
    """Add entries that nobody reads to those that go, until their size is enough. Returns how much is missing."""
    for digest, namespace, size in rows:
        if enough <= 0 or len(gone) == BATCH:
            break
        if digest not in gone and taken.take(digest):
            gone[digest] = namespace, size
            enough -= size
    return max(0, int(enough)) if enough < math.inf else 0


def _last(rows: Iterable[tuple[str, str, int]], spared: Collection[str]) -> Iterator[tuple[str, str, int]]:
    """The same rows, with spared ones last, and without the last of these."""
    late = []
    for row in rows:
        if row[0] in spared:
            late.append(row)
        else:
            yield row
    yield from late[:-1]


def _is_due(db: Database) -> bool:
    """Whether the last sweep was long ago, or is in the future because the clock was wrong."""
    swept = memory.recall(db, [SWEPT]).get(SWEPT)
    try:
        return swept is None or not 0 <= time.time() - float(swept) < SWEEP_EVERY_S
    except (TypeError, ValueError):
        return True  # somebody else wrote it
