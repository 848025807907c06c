"""The chunks of one namespace: look up, list, delete."""

from collections.abc import Sequence
from dataclasses import replace

from braidsdk.engine import Engine
from braidsdk.errors import InputError, UnknownChunkError
from braidsdk.store import ChunkRow
from braidsdk.types import Chunk


class Chunks:
    """`Braid.chunks`: the registered chunks of the open namespace."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, name_or_id: str) -> Chunk:
        """The chunk of that name or id.

        Raises:
            UnknownChunkError: there is none in this namespace.
        """
        self._engine.check_open()
        if not isinstance(name_or_id, str):
            raise InputError(f"a chunk's name or id is a str; got a {type(name_or_id).__name__}.")
        row = self._engine.store.find_chunk(self._engine.namespace, name_or_id)
        if row is None:
            raise self._unknown(name_or_id)
        return self.from_row(row)

    def list(self) -> list[Chunk]:
        """All chunks, in the order of their registration."""
        self._engine.check_open()
        return [self.from_row(row) for row in self._engine.store.list_chunks(self._engine.namespace)]

    def delete(self, chunk: Chunk | str) -> int:
        """Delete a chunk, its names, its KV entries and every entry that was computed with sight of it.

        Returns:
            How many stored KV entries went.

        Raises:
            UnknownChunkError: there is no such chunk in this namespace.
        """
        found = self.resolve([chunk])[0]
        with self._engine.working():
            gone = self._engine.store.delete_chunk(self._engine.namespace, found.id)
            self._engine.pool.drop_chunk(found.id)
        return len(gone)

    def resolve(self, chunks: Sequence[Chunk | str]) -> tuple[Chunk, ...]:
        """Chunks for chunks, names and ids, in order; all are checked against the store.

        Raises:
            InputError: these are no chunks, names or ids.
            UnknownChunkError: one is not in this namespace.
        """
        self._engine.check_open()
        if isinstance(chunks, str | Chunk):
            raise InputError("chunks must be a list of chunks, names or ids; got a single one. Put it in a list.")
        for chunk in chunks:
            if not isinstance(chunk, str | Chunk):
                raise InputError(f"chunks must hold chunks, names or ids; got a {type(chunk).__name__}.")
        ids = [chunk.id for chunk in chunks if isinstance(chunk, Chunk)]
        there = self._engine.store.find_chunks(self._engine.namespace, ids)
        found = []
        for chunk in chunks:
            if isinstance(chunk, str):
                found.append(self.get(chunk))
            elif chunk.id in there:
                # The caller's may come from a Braid with another tokenizer.
                found.append(replace(chunk, _encode=self._engine.layout.chunk_ids))
            else:
                raise self._unknown(chunk.label)
        return tuple(found)

    def from_row(self, row: ChunkRow) -> Chunk:
        """The public view of a stored chunk."""
        return Chunk(
            id=row.id,
            namespace=row.namespace,
            level=row.level,
            text=row.text,
            name=row.name,
            metadata=row.metadata,
            _encode=self._engine.layout.chunk_ids,
        )

    def _unknown(self, name_or_id: str) -> UnknownChunkError:
        close = self._engine.store.close_names(self._engine.namespace, name_or_id)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else " Register its text first."
        return UnknownChunkError(f"No chunk {name_or_id[:80]!r} in namespace {self._engine.namespace!r}.{hint}")
