"""Which chunks a command means: names, ids and globs, in the order in which they are read."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from braidsdk.errors import UnknownChunkError
from braidsdk.store import ChunkRow, ChunkStore

if TYPE_CHECKING:
    from braidsdk import Braid, Chunk

GLOB = "*?["
"""A pattern holds one of these characters."""


class Registered(Protocol):
    """What is known of a registered chunk, in the store or in an open Braid."""

    @property
    def id(self) -> str: ...
    @property
    def level(self) -> int: ...
    @property
    def name(self) -> str | None: ...


C = TypeVar("C", bound=Registered)


def is_glob(word: str) -> bool:
    """Whether a word is a pattern, if it is no chunk's name."""
    return any(char in word for char in GLOB)


def select(store: ChunkStore, namespace: str, words: Iterable[str]) -> list[ChunkRow]:
    """The chunks that these names, ids and globs mean, each once, in their order; within a glob in reading order.

    Raises:
        UnknownChunkError: a name or an id is not there, or a glob fits none.
    """
    found: dict[str, ChunkRow] = {}
    for word in words:
        exact = store.find_chunk(namespace, word)
        rows = [exact] if exact else reading_order(store.list_chunks(namespace, name=word)) if is_glob(word) else []
        if not rows:
            raise _unknown(store, namespace, word)
        for row in rows:
            found.setdefault(row.id, row)
    return list(found.values())


def choose(braid: "Braid", words: Iterable[str] | None) -> list["Chunk"]:
    """`select` for an open Braid; None is all chunks in reading order."""
    if words is None:
        return reading_order(braid.chunks.list())
    found: dict[str, Chunk] = {}
    for word in words:
        for chunk in (is_glob(word) and reading_order(braid.chunks.list(name=word))) or [braid.chunks.get(word)]:
            found.setdefault(chunk.id, chunk)
    return list(found.values())


def reading_order(chunks: Sequence[C]) -> list[C]:
    """System prompts first; the pieces of a file together and in order, files in the order of registration."""
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
    """The number behind `#` in the name of a piece; 0 in that of a whole text."""
    base, _, number = name.rpartition("#")
    return int(number) if base and number.isascii() and number.isdigit() else 0


def _unknown(store: ChunkStore, namespace: str, word: str) -> UnknownChunkError:
    if is_glob(word):
        return UnknownChunkError(
            f"No chunk's name in namespace {namespace!r} fits {word[:80]!r}. `braid ls` lists them."
        )
    close = store.close_names(namespace, word)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "`braid ls` lists them."
    return UnknownChunkError(f"No chunk {word[:80]!r} in namespace {namespace!r}. {hint}")
