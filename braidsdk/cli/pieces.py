"""Cuts sources into named pieces, and finds chunks in a store that are not in their files any more.

A chunk that `braid add` made remembers all its files in its metadata. So a later run knows which names it may move to
new text, and which chunks were left behind, whatever was renamed, copied or edited. Knows nothing about models.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidsdk.cli.select import file_of
from braidsdk.cli.sources import Source
from braidsdk.errors import NameTakenError
from braidsdk.store import ChunkRow, chunk_id

SOURCE, PIECE, PIECES, NAME, SOURCES = "source", "piece", "pieces", "name", "sources"
"""Keys of a chunk's metadata: its file's path, the number of the piece, from 1, and how many pieces there are; and the
same of all files that it was found in, with their names."""


@dataclass(frozen=True)
class Piece:
    """A text to register.

    Attributes:
        id: the chunk's id.
        name: the file's name, with `#` and the piece's number if there are several; None for unnamed stdin.
        text: its text, NFC-normalised and without white space around it.
        metadata: where it comes from; None for stdin.
        source: the source that it is a piece of.
    """

    id: str
    name: str | None
    text: str
    metadata: dict[str, Any] | None
    source: Source


def cut(sources: Iterable[Source], split: Callable[[str], Sequence[str]], *, namespace: str, level: int) -> list[Piece]:
    """Cut sources into pieces and name them."""
    pieces = []
    for source in sources:
        texts = split(unicodedata.normalize("NFC", source.text).strip())
        for number, text in enumerate(texts, 1):
            origin = {SOURCE: str(source.path), PIECE: number, PIECES: len(texts)} if source.path else None
            name = f"{source.name}#{number}" if source.name and len(texts) > 1 else source.name
            pieces.append(Piece(chunk_id(namespace, level, text), name, text, origin, source))
    return pieces


def check_names(pieces: Iterable[Piece], held: Sequence[ChunkRow]) -> None:
    """Refuse to move a name away from a text that did not come from the same file.

    Raises:
        NameTakenError: a piece's name stands for such a text.
    """
    holders = {name: row for row in held for name in row.names}
    for piece in pieces:
        row = holders.get(piece.name or "")
        if row and row.id != piece.id and not _is_from(row, piece.source):
            origin = row.metadata.get(SOURCE)
            raise NameTakenError(
                f"The name {piece.name!r} must be free or belong to this file; it belongs to another text, "
                f"{f'from {origin}' if origin else row.id}. Move it to the new text with --replace, choose another "
                "with --name, or keep the texts apart with --namespace."
            )


def merged_metadata(pieces: Sequence[Piece], held: Sequence[ChunkRow]) -> list[dict[str, Any] | None]:
    """Each piece's metadata, added to what its chunk has already. All sources are remembered: those of earlier runs,
    and of pieces with the same text."""
    known: Mapping[str, dict[str, Any]] = {row.id: row.metadata for row in held}
    sources: dict[str, dict[str, dict[str, Any]]] = {}
    for row in held:
        sources[row.id] = {each[SOURCE]: each for each in sources_of(row)}
    for piece in pieces:
        if piece.metadata is not None:
            origin = {**piece.metadata, NAME: piece.source.name}
            sources.setdefault(piece.id, {})[piece.metadata[SOURCE]] = origin
    return [
        None
        if piece.metadata is None
        else {**known.get(piece.id, {}), **piece.metadata, SOURCES: list(sources[piece.id].values())}
        for piece in pieces
    ]


def sources_of(row: ChunkRow) -> list[dict[str, Any]]:
    """The files that a chunk was found in by `braid add`, with the names that they had; some may be gone."""
    found = row.metadata.get(SOURCES)
    return [
        each
        for each in (found if isinstance(found, list) else [])
        if isinstance(each, dict) and isinstance(each.get(SOURCE), str)
    ]


def left_behind(
    pieces: Sequence[Piece], held: Sequence[ChunkRow], folders: Sequence[Path], *, replaced: bool
) -> list[ChunkRow]:
    """Chunks that no file holds any more: each of their sources was read and has other text now, or is gone from the
    folders. A chunk with a name that no source gave it stays.

    Args:
        pieces: all pieces of the sources.
        held: the namespace's chunks before these were registered.
        folders: folders from which files may be gone.
        replaced: whether a source's names count as its own, wherever their texts came from.
    """
    now = {piece.id for piece in pieces}
    read = {str(piece.source.path) for piece in pieces if piece.source.path}
    bases = {piece.source.name for piece in pieces}

    def is_gone(source: str) -> bool:
        path = Path(source)
        return source in read or (any(map(path.is_relative_to, folders)) and not _may_exist(path))

    gone = []
    for row in held:
        if row.id in now:
            continue
        own, sources = set(map(file_of, row.names)), sources_of(row)
        if sources:
            mine = own <= {each.get(NAME) for each in sources} and all(is_gone(each[SOURCE]) for each in sources)
        else:
            mine = replaced and bool(own) and own <= bases
        if mine:
            gone.append(row)
    return gone


def _may_exist(path: Path) -> bool:
    """Whether a file is there, or in a folder that can't be looked into."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _is_from(row: ChunkRow, source: Source) -> bool:
    return source.path is not None and any(each[SOURCE] == str(source.path) for each in sources_of(row))
