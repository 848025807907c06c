"""The chunks of one namespace: look up, list, change, delete."""

import builtins
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from braidsdk.engine.engine import Engine
from braidsdk.errors import InputError, UnknownChunkError, shown
from braidsdk.ingest.check import text_of
from braidsdk.prompt.text import check_length, normalise
from braidsdk.store import ChunkRow, chunk_id
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM, Chunk, ChunkVersion, Composable, Inline, PageDocument, TextNode

PAGE = 1_000
"""How many chunks iterating holds in memory at a time."""


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
            raise InputError(f"A chunk's name or id must be a str; got a {type(name_or_id).__name__}.")
        row = self._engine.store.find_chunk(self._engine.namespace, name_or_id)
        if row is None:
            raise self._unknown(name_or_id)
        return self.from_row(row)

    def list(
        self,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        level: int | None = None,
        limit: int | None = None,
        after: Chunk | str | None = None,
    ) -> builtins.list[Chunk]:
        """Chunks in the order of their registration. Without an argument it lists all of them.

        To read a page at a time, call `list(limit=100)`, then `list(limit=100, after=page[-1])` until a page is empty.

        Args:
            name: a pattern that one of the chunk's names must fit: `*`, `?` and `[...]` as in the shell, and the case
                matters. The chunk then carries the name that fits.
            metadata: keys and values that its metadata must have: text, numbers, bools and None.
            level: 0 for system prompts, 1 for context.
            limit: the most chunks to list.
            after: a chunk, its name or its id. Only chunks that were registered after it are listed.

        Raises:
            InputError: an argument can't be used.
            UnknownChunkError: `after` is not there, or not any more.
        """
        self._check(name, metadata, level)
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InputError(f"limit must be a whole number of at least 0, or None; got {shown(limit)}.")
        rows = self._engine.store.list_chunks(
            self._engine.namespace,
            name=name,
            metadata=metadata,
            level=level,
            limit=limit,
            after=None if after is None else self.resolve([after])[0].id,
        )
        return [self.from_row(row) for row in rows]

    def count(
        self, *, name: str | None = None, metadata: Mapping[str, Any] | None = None, level: int | None = None
    ) -> int:
        """How many chunks `list` would give. It takes the same arguments, raises the same errors, and reads no text."""
        self._check(name, metadata, level)
        return self._engine.store.count_chunks(self._engine.namespace, name=name, metadata=metadata, level=level)

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return True  # even without chunks

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks that are there now, in the order of their registration. Only `PAGE` of them are in memory at a
        time. A chunk that is deleted before its turn is left out."""
        self._engine.check_open()
        ids = self._engine.store.chunk_ids(self._engine.namespace)
        for start in range(0, len(ids), PAGE):
            page = ids[start : start + PAGE]
            rows = self._engine.store.find_chunks(self._engine.namespace, page)
            yield from (self.from_row(rows[each]) for each in page if each in rows)

    def update(
        self,
        chunk: Chunk | str,
        *,
        metadata: Mapping[str, Any] | None = None,
        name: str | None = None,
        replace: bool = False,
        pinned: bool | None = None,
    ) -> Chunk:
        """Give a chunk other metadata, one more name, or a pin. Its text, id and KV entries stay as they are, because
        another text is another chunk.

        Args:
            chunk: a chunk, its name or its id.
            metadata: JSON types that replace what the chunk has. None changes nothing.
            name: one more name. None adds none.
            replace: lets `name` move here from another text. `history` tells what it stood for.
            pinned: whether its KV entries stay when others are evicted to keep the store within its limits. None
                changes nothing.

        Returns:
            The chunk as it is now.

        Raises:
            UnknownChunkError: there is no such chunk in this namespace.
            NameTakenError: `name` stands for another text and `replace` is off.
            InputError: name or metadata can't be used.
        """
        found = self.resolve([chunk])[0]
        row = self._engine.store.update_chunk(
            self._engine.namespace, found.id, name=name, metadata=metadata, replace=replace, pinned=pinned
        )
        return self.from_row(row)

    def history(self, name: str) -> builtins.list[ChunkVersion]:
        """What a name stands for and stood for, the newest first. A name moves when another text is registered with it
        and `replace=True`. At most 100 chunks before the present one are known, and none that were deleted.

        Raises:
            UnknownChunkError: the name was never given in this namespace, or all its chunks were deleted.
        """
        self._engine.check_open()
        if not isinstance(name, str):
            raise InputError(f"A chunk's name must be a str; got a {type(name).__name__}.")
        store, namespace = self._engine.store, self._engine.namespace
        found = store.versions(namespace, name)
        rows = store.find_chunks(namespace, [each.chunk_id for each in found])
        versions = [
            ChunkVersion(
                self.from_row(rows[each.chunk_id]),
                datetime.fromisoformat(each.since),
                None if each.until is None else datetime.fromisoformat(each.until),
            )
            for each in found
            if each.chunk_id in rows  # it may have been deleted since
        ]
        if not versions:
            raise self._unknown(name)
        return versions

    def restore(self, name: str, chunk: Chunk | str | None = None) -> Chunk:
        """Let a name stand again for a chunk that it stood for.

        Args:
            name: the name.
            chunk: one of `history(name)`, or its id. None takes the one before the present one, or the last one if the
                name stands for none now.

        Returns:
            The chunk that the name stands for now.

        Raises:
            UnknownChunkError: the name is unknown, or never stood for this chunk, or for no other one.
        """
        self._engine.check_open()
        wanted = chunk.id if isinstance(chunk, Chunk) else chunk
        if not isinstance(name, str) or not isinstance(wanted, str | None):
            raise InputError("restore takes a name, and a chunk or its id. Pass one of chunks.history(name).")
        return self.from_row(self._engine.store.restore_name(self._engine.namespace, name, wanted))

    def delete(self, chunk: Chunk | str) -> int:
        """Delete a chunk, its names, its KV entries and every entry that was computed after it.

        Returns:
            How many stored KV entries were deleted.

        Raises:
            UnknownChunkError: there is no such chunk in this namespace.
        """
        return self.delete_many([chunk])

    def delete_many(self, chunks: Iterable[Chunk | str]) -> int:
        """Delete many chunks in one transaction: all of them, or none if one is not there.

        `braid.chunks.delete_many(braid.chunks.list(name="guide*"))` deletes by pattern.
        """
        found = self.resolve(chunks if isinstance(chunks, str | Chunk) else [*chunks])
        gone = self._engine.store.delete_chunks(self._engine.namespace, [chunk.id for chunk in found])
        self._engine.forget({chunk.id for chunk in found})
        for chunk in found:
            self._engine.layout.forget(chunk.text)
        return len(gone.digests)

    def resolve(self, chunks: Sequence[Composable], *, inline: bool = False) -> tuple[Chunk, ...]:
        """The chunks that are meant by chunks, names, ids and a retriever's objects, in order. All are checked against
        the store, except, where `inline` allows them, texts that need not be registered.

        Raises:
            InputError: an argument is none of these.
            UnknownChunkError: one is not in this namespace.
        """
        self._engine.check_open()
        if isinstance(chunks, str | Chunk):
            raise InputError("chunks must be a list of chunks, names or ids; got a single one. Put it into a list.")
        if inline:  # an answer's sources may be some
            chunks = [Inline(c.text, c.level) if isinstance(c, Chunk) and not c.id else c for c in chunks]
        elif any(isinstance(each, Inline) or (isinstance(each, Chunk) and not each.id) for each in chunks):
            raise InputError("chunks must be registered; got an Inline text. Register it first.")
        store, namespace, encode = self._engine.store, self._engine.namespace, self._engine.layout.chunk_ids
        wanted = [chunk if isinstance(chunk, str) else self._id_of(chunk) for chunk in chunks]
        read = [each for chunk, each in zip(chunks, wanted, strict=True) if not isinstance(chunk, Chunk)]
        rows = store.find_named(namespace, read) if read else {}
        known = store.known_chunks(namespace, (chunk.id for chunk in chunks if isinstance(chunk, Chunk)))
        found = []
        for chunk, name_or_id in zip(chunks, wanted, strict=True):
            if isinstance(chunk, Chunk):
                if name_or_id not in known:
                    raise self._not_there(chunk)
                # The caller's chunk may come from a Braid with another tokenizer.
                found.append(chunk if chunk._encode == encode else replace(chunk, _encode=encode))
            elif isinstance(chunk, Inline) and name_or_id not in rows:
                found.append(Chunk("", namespace, chunk.level, normalise(chunk.text), _encode=encode))
            else:
                if name_or_id not in rows:
                    raise self._not_there(chunk)
                found.append(self.from_row(rows[name_or_id]))
        return tuple(found)

    def _id_of(self, given: Chunk | Inline | PageDocument | TextNode) -> str:
        """The id of a chunk, or of the chunk that has the text of an inline text or of a retriever's object."""
        if isinstance(given, Chunk):
            return given.id
        if isinstance(given, Inline):
            self._check_level(given.level)
            if isinstance(given.text, str):
                check_length(given.text, self._engine.config.window, "An Inline text", "Shorten it, or split it.")
            return chunk_id(self._engine.namespace, given.level, normalise(given.text, "An Inline text"))
        try:
            text, _ = text_of(given)
        except InputError:
            raise InputError(
                f"chunks must hold chunks, names or ids; got a {type(given).__name__}. Pass what register returned."
            ) from None
        return chunk_id(self._engine.namespace, LEVEL_CONTEXT, normalise(text))  # type: ignore[arg-type]  # checks it

    def _check(self, name: object, metadata: object, level: object) -> None:
        self._engine.check_open()
        if name is not None and not isinstance(name, str):
            raise InputError(f"name must be a pattern such as 'guide*', or None; got a {type(name).__name__}.")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InputError(f"metadata must be a mapping of keys to values, or None; got a {type(metadata).__name__}.")
        if level is not None:
            self._check_level(level)

    def _check_level(self, level: object) -> None:
        if type(level) is not int or level not in (LEVEL_SYSTEM, LEVEL_CONTEXT):
            raise InputError(f"level must be 0 (system prompt) or 1 (context); got {shown(level)}.")

    def from_row(self, row: ChunkRow) -> Chunk:
        """The public view of a stored chunk."""
        return Chunk(
            id=row.id,
            namespace=row.namespace,
            level=row.level,
            text=row.text,
            name=row.name,
            metadata=row.metadata,
            pinned=row.pinned,
            _encode=self._engine.layout.chunk_ids,
        )

    def _not_there(self, wanted: Composable) -> UnknownChunkError:
        if isinstance(wanted, str | Chunk):
            return self._unknown(wanted if isinstance(wanted, str) else wanted.label)
        return UnknownChunkError(
            f"The text of this {type(wanted).__name__} must be registered in namespace "
            f"{shown(self._engine.namespace)}; it is not. Pass it to register or register_many first."
        )

    def _unknown(self, name_or_id: str) -> UnknownChunkError:
        close = self._engine.store.close_names(self._engine.namespace, name_or_id)
        hint = f" Did you mean {' or '.join(map(shown, close))}?" if close else " Register its text first."
        return UnknownChunkError(f"No chunk {shown(name_or_id)} in namespace {shown(self._engine.namespace)}.{hint}")
