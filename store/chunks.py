"""Registered chunks and their names, as rows of the index.

Each function takes the open index and runs inside the caller's transaction. Knows nothing of KV entries.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database

from braidsdk.errors import EmptyTextError, HashCollisionError, InputError, NameTakenError, StoreCorruptError
from braidsdk.store.keys import chunk_id, looks_like_chunk_id

NAME_LIMIT = 500
"""Longest name, in characters."""

SUGGEST_AMONG = 5_000
"""Names that `close_names` compares at most: the comparison is slow."""

PARAMETERS = 900
"""Parameters per query; the smallest limit of any SQLite in use is 999."""


@dataclass(frozen=True)
class NewChunk:
    """A chunk to register: normalised text, its name and metadata if it has any."""

    namespace: str
    level: int
    text: str
    name: str | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ChunkRow:
    """A registered chunk.

    Attributes:
        id: 32 hex digits, a hash of namespace, level and text.
        namespace: where its names are unique.
        level: 0 system, 1 context, 2 query.
        text: normalised text.
        name: the name that it was asked for by, or its first one; None without any.
        names: all its names, in the order of registration.
        metadata: the application's own, as JSON gives it back.
    """

    id: str
    namespace: str
    level: int
    text: str
    name: str | None = None
    names: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


def add(db: Database, chunk: NewChunk, *, replace: bool) -> ChunkRow:
    """Register one chunk; see `ChunkStore.add_chunk`."""
    _check(chunk)
    new_id = chunk_id(chunk.namespace, chunk.level, chunk.text)
    metadata = None if chunk.metadata is None else _metadata_json(chunk.metadata)
    found = list(db.query("select namespace, level, text from chunks where id = ?", [new_id]))
    if not found:
        row = {"id": new_id, "namespace": chunk.namespace, "level": chunk.level, "text": chunk.text}
        db.table("chunks").insert({**row, "metadata": metadata or "{}", "created": now()})
    elif found[0] != {"namespace": chunk.namespace, "level": chunk.level, "text": chunk.text}:
        raise HashCollisionError(
            f"Expected the id {new_id} to be free or to stand for this text, but another text in namespace "
            f"{found[0]['namespace']!r} has it. Change the text by a character, for example add a space inside."
        )
    elif metadata is not None:
        db.execute("update chunks set metadata = ? where id = ?", [metadata, new_id])
    if chunk.name is not None:
        _name(db, chunk.namespace, chunk.name, new_id, replace=replace)
    return _rows(db, "id = ?", [new_id], asked={new_id: chunk.name})[0]


def find(db: Database, namespace: str, name_or_id: str) -> ChunkRow | None:
    """Return the chunk of that name in the namespace, else the one of that id, else None."""
    named = list(
        db.query("select chunk_id from names where namespace = ? and name = ?", [namespace, _bindable(name_or_id)])
    )
    wanted = named[0]["chunk_id"] if named else _bindable(name_or_id)
    rows = _rows(db, "id = ?", [wanted], asked={wanted: name_or_id if named else None})
    return rows[0] if rows and rows[0].namespace == namespace else None


def find_many(db: Database, namespace: str, ids: Iterable[str]) -> dict[str, ChunkRow]:
    """Return the chunks of these ids in the namespace, by id; unknown ids are left out."""
    found: dict[str, ChunkRow] = {}
    for part in parts(list(dict.fromkeys(ids))):
        rows = _rows(db, f"id in ({placeholders(part)})", [*part])  # with the namespace in it, SQLite scans that
        found.update((row.id, row) for row in rows if row.namespace == namespace)
    return found


def known(db: Database, namespace: str, ids: Iterable[str]) -> set[str]:
    """Return those of the ids that are registered in the namespace."""
    found: set[str] = set()
    for part in parts(list(dict.fromkeys(ids))):
        rows = db.table("chunks").rows_where(f"id in ({placeholders(part)})", [*part], select="id, namespace")
        found.update(row["id"] for row in rows if row["namespace"] == namespace)
    return found


def list_all(db: Database, namespace: str) -> list[ChunkRow]:
    """Return the namespace's chunks in the order of registration."""
    return _rows(db, "namespace = ?", [namespace])


def close_names(db: Database, namespace: str, name: str) -> list[str]:
    """Return up to three names of the namespace that resemble `name`, the closest first."""
    rows = db.query(
        "select name from names where namespace = ? and length(name) between ? and ? order by number desc limit ?",
        [namespace, len(name) // 2, len(name) * 2 + 2, SUGGEST_AMONG],
    )
    return difflib.get_close_matches(name, [row["name"] for row in rows], n=3, cutoff=0.6)


def owner(db: Database, wanted: str) -> str | None:
    """Return the namespace of the chunk of that id, None without one."""
    rows = list(db.query("select namespace from chunks where id = ?", [_bindable(wanted)]))
    return rows[0]["namespace"] if rows else None


def delete(db: Database, namespace: str, wanted: str) -> None:
    """Delete a chunk's row and its names; its entries must be gone."""
    db.table("chunks").delete_where("namespace = ? and id = ?", [namespace, wanted])


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat()


def parts(items: Sequence[str]) -> Iterable[Sequence[str]]:
    """Cut a sequence into pieces that fit one query's parameters."""
    return (items[start : start + PARAMETERS] for start in range(0, len(items), PARAMETERS))


def placeholders(items: Sequence[str]) -> str:
    """Return as many question marks as there are items."""
    return ",".join("?" * len(items))


def _check(chunk: NewChunk) -> None:
    if not chunk.text:
        raise EmptyTextError("Expected a chunk's text, got an empty one. Register text with at least one character.")
    if not chunk.namespace:
        raise InputError('Expected a namespace, got an empty one. Leave it out for the namespace "default".')
    if not isinstance(chunk.level, int) or not 0 <= chunk.level <= 2:
        raise InputError(f"Expected a level of 0 (system), 1 (context) or 2 (query), got {chunk.level!r}.")
    name = chunk.name
    if name is None:
        return
    _bindable(name)
    if not name.strip() or len(name) > NAME_LIMIT:
        raise InputError(
            f"Expected a name of 1 to {NAME_LIMIT} characters, got {len(name)}{'' if name.strip() else ' blank ones'}."
            " Choose another name, or leave it out."
        )
    if looks_like_chunk_id(name):
        raise InputError(
            f"Expected a name that can't be taken for a chunk's id, got 32 hex digits ({name}). "
            "Put a letter beyond f before it."
        )


def _name(db: Database, namespace: str, name: str, new_id: str, *, replace: bool) -> None:
    taken = list(db.query("select number, chunk_id from names where namespace = ? and name = ?", [namespace, name]))
    if not taken:
        db.table("names").insert({"namespace": namespace, "name": name, "chunk_id": new_id})
    elif taken[0]["chunk_id"] != new_id:
        if not replace:
            raise NameTakenError(
                f"Expected the name {name!r} to be free in namespace {namespace!r} or to stand for this text, but it "
                f"stands for chunk {taken[0]['chunk_id']}. Pass replace=True to move the name, or choose another."
            )
        db.table("names").update(taken[0]["number"], {"chunk_id": new_id})


def _rows(
    db: Database, where: str, arguments: list[Any], *, asked: Mapping[str, str | None] | None = None
) -> list[ChunkRow]:
    """Read chunks with their names, in the order of registration, and check each text against its id."""
    names: dict[str, list[str]] = {}
    order = f"select chunk_id, name from names where chunk_id in (select id from chunks where {where}) order by number"
    for row in db.query(order, arguments):
        names.setdefault(row["chunk_id"], []).append(row["name"])
    columns = "id, namespace, level, text, metadata"
    rows = []
    for row in db.query(f"select {columns} from chunks where {where} order by number", arguments):
        if chunk_id(row["namespace"], row["level"], row["text"]) != row["id"]:
            raise StoreCorruptError(
                f"Expected chunk {row['id']} to have the text that its id is the hash of, but the index holds another. "
                "Move the index aside (index.db, index.db-wal, index.db-shm): the next open rebuilds it from the "
                "entries."
            )
        own = tuple(names.get(row["id"], ()))
        name = (asked or {}).get(row["id"]) or (own[0] if own else None)
        metadata = {} if row["metadata"] == "{}" else json.loads(row["metadata"])
        rows.append(ChunkRow(row["id"], row["namespace"], row["level"], row["text"], name, own, metadata))
    return rows


def _metadata_json(metadata: Mapping[str, Any]) -> str:
    try:
        return _bindable(json.dumps(dict(metadata), ensure_ascii=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"Expected metadata of plain JSON values, got one that isn't: {error}.") from None


def _bindable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            "Expected Unicode characters, got a lone surrogate in a name or an id. "
            "Decode it with errors='replace' where it is read."
        ) from None
    return text
