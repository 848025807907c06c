"""Chunks that were read lately, for as long as nobody has written to the index since.

Every call looks its chunks up, so that what one process deletes no other keeps answering from. SQLite says in
microseconds whether another process has written; reading nine chunks takes it a hundred times as long.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from threading import Lock

from braidsdk.store import chunks
from braidsdk.store.chunks import ChunkRow
from braidsdk.store.index import Index

MOST_CHARACTERS = 16 * 2**20
"""Of all texts that are remembered."""


@dataclass
class _Seen:
    """What was read at one version of the index, by namespace and name or id."""

    version: tuple[int, int] | None = None
    rows: dict[tuple[str, str], ChunkRow] = field(default_factory=dict)
    ids: set[tuple[str, str]] = field(default_factory=set)
    characters: int = 0


class RecentChunks:
    """See the module. Safe to use from several threads."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = Lock()
        self._seen = _Seen()

    def find_named(self, namespace: str, names_or_ids: Iterable[str]) -> dict[str, ChunkRow]:
        """As `chunks.find_named`."""
        wanted, seen = list(dict.fromkeys(names_or_ids)), self._now()
        absent = [each for each in wanted if (namespace, each) not in seen.rows]
        read: dict[str, ChunkRow] = {}
        if absent:
            with self._index.read() as db:
                read = chunks.find_named(db, namespace, absent)
            with self._lock:
                seen.rows.update({(namespace, each): row for each, row in read.items()})
                seen.ids.update((namespace, row.id) for row in read.values())
                seen.characters += sum(len(row.text) for row in read.values())
        found = {each: row for each in wanted if (row := seen.rows.get((namespace, each)) or read.get(each))}
        return {each: replace(row, metadata=deepcopy(row.metadata)) for each, row in found.items()}

    def known(self, namespace: str, ids: Iterable[str]) -> set[str]:
        """As `chunks.known`."""
        wanted, seen = set(ids), self._now()
        absent = [each for each in wanted if (namespace, each) not in seen.ids]
        if not absent:
            return wanted
        with self._index.read() as db:
            read = chunks.known(db, namespace, absent)
        with self._lock:
            seen.ids.update((namespace, each) for each in read)
        return wanted.difference(absent) | read

    def _now(self) -> _Seen:
        """What was read at this version of the index; what a reader adds late stays with the version that it saw."""
        version = self._index.version()
        with self._lock:
            if version != self._seen.version or self._seen.characters > MOST_CHARACTERS:
                self._seen = _Seen(version)
            return self._seen
