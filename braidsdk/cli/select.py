"""Finds the chunks that a word means, by one rule for every command that takes names, ids and globs."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from braidsdk.errors import UnknownChunkError
from braidsdk.store import ChunkRow, ChunkStore

GLOB = "*?["
"""A pattern holds one of these characters."""


class Registered(Protocol):
    """What is known about a registered chunk, in the store or in an open Braid."""

    @property
    def id(self) -> str: ...
    @property
    def level(self) -> int: ...
    @property
    def name(self) -> str | None: ...


C = TypeVar("C", bound=Registered)
C_co = TypeVar("C_co", bound=Registered, covariant=True)


class Catalogue(Protocol[C_co]):
    """Where chunks are looked up. `Braid.chunks` is one."""

    def get(self, name_or_id: str) -> C_co:
        """The chunk of that name or id.

        Raises:
            UnknownChunkError: there is none.
        """
        ...

    def list(self, *, name: str) -> Sequence[C_co]:
        """The chunks with a name that matches this glob."""
        ...


class StoredChunks:
    """The chunks of one namespace of a store, for commands that load no model."""

    def __init__(self, store: ChunkStore, namespace: str) -> None:
        self._store = store
        self._namespace = namespace

    def get(self, name_or_id: str) -> ChunkRow:
        """See `Catalogue`."""
        row = self._store.find_chunk(self._namespace, name_or_id)
        if row is None:
            close = self._store.close_names(self._namespace, name_or_id)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "`braid ls` lists them."
            raise UnknownChunkError(f"No chunk {name_or_id[:80]!r} in namespace {self._namespace!r}. {hint}")
        return row

    def list(self, *, name: str) -> Sequence[ChunkRow]:
        """See `Catalogue`."""
        return self._store.list_chunks(self._namespace, name=name)


def is_glob(word: str) -> bool:
    """Whether a word is a pattern. It is not one if a chunk has the word as its name."""
    return any(char in word for char in GLOB)


def select(catalogue: Catalogue[C], words: Iterable[str]) -> list[C]:
    """The chunks that these words mean, each once, in the order of the words.

    A word is first taken as a name or an id: a chunk called `notes[1].txt` is found by that name, whatever the glob
        would
    match. If it is neither and holds `*`, `?` or `[`, it is a glob. It then means all chunks with a name that matches,
    in reading order.

    Raises:
        UnknownChunkError: a word means no chunk.
    """
    found: dict[str, C] = {}
    for word in words:
        for chunk in _meant(catalogue, word):
            found.setdefault(chunk.id, chunk)
    return list(found.values())


def _meant(catalogue: Catalogue[C], word: str) -> Sequence[C]:
    try:
        return [catalogue.get(word)]
    except UnknownChunkError:
        if not is_glob(word):
            raise
    fitting = reading_order(catalogue.list(name=word))
    if not fitting:
        raise UnknownChunkError(f"No chunk has a name that matches {word[:80]!r}. Check the pattern.")
    return fitting


def reading_order(chunks: Sequence[C]) -> list[C]:
    """Sort chunks: system prompts first, then files in the order of registration, each file's pieces in order."""
    first: dict[str, int] = {}
    for index, chunk in enumerate(chunks):
        first.setdefault(file_of(chunk.name or chunk.id), index)

    def key(chunk: C) -> tuple[int, int, int]:
        name = chunk.name or chunk.id
        return (chunk.level, first[file_of(name)], piece_of(name))

    return sorted(chunks, key=key)


def file_of(name: str) -> str:
    """A chunk's name without the number of the piece."""
    return name.rpartition("#")[0] if piece_of(name) else name


def piece_of(name: str) -> int:
    """The number after `#` in the name of a piece; 0 if the name belongs to a whole text."""
    base, _, number = name.rpartition("#")
    return int(number) if base and number.isascii() and number.isdigit() else 0
