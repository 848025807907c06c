"""Registered chunks and their names, as rows of the index.

Each function takes the open index and runs inside the caller's transaction. Knows nothing about KV entries.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database

from braidsdk.errors import (
    EmptyTextError,
    HashCollisionError,
    InputError,
    NameTakenError,
    StoreCorruptError,
    UnknownChunkError,
    shown,
)
from braidsdk.store.files import REPAIR
from braidsdk.store.keys import chunk_id, looks_like_chunk_id
from braidsdk.store.schema import ID_INDEX, METADATA_INDEX

NAME_LIMIT = 500
"""Longest name, in characters."""

METADATA_DEPTH = 64
"""The most levels of lists and objects in metadata. Deeper ones break JSON libraries and copies elsewhere."""

FORMER_NAMES = 100
"""The most chunks that a name is known to have stood for before."""

SUGGEST_AMONG = 5_000
"""The most names that `close_names` compares, because the comparison is slow."""

PARAMETERS = 900
"""Parameters per query. The smallest limit of any SQLite in use is 999."""


@dataclass(frozen=True)
class NewChunk:
    """A chunk to register: its normalised text, and its name and metadata if it has any."""

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
        namespace: the namespace in which its names are unique.
        level: 0 for a system prompt, 1 for context, 2 for a query.
        text: its normalised text.
        name: the name that it was asked for by, else its first name, else None.
        names: all its names, in the order of registration.
        metadata: the application's own values, as JSON gives them back.
        pinned: whether its entries stay when others are evicted.
    """

    id: str
    namespace: str
    level: int
    text: str
    name: str | None = None
    names: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    pinned: bool = False


@dataclass(frozen=True)
class NameVersion:
    """A chunk that a name stands for or stood for.

    Attributes:
        chunk_id: the chunk.
        since: when the name was given to it, ISO 8601 in UTC.
        until: when the name was given to another chunk; None if it stands for this one.
    """

    chunk_id: str
    since: str
    until: str | None = None


@dataclass(frozen=True)
class ChunkFilter:
    """Which chunks of a namespace are wanted. A None excludes nothing.

    Attributes:
        name: a pattern that one of the chunk's names must fit: `*`, `?` and `[...]` as in the shell, and the case
            matters.
        metadata: keys and values that its metadata must have: text, numbers, bools and None.
        level: its level.
    """

    name: str | None = None
    metadata: Mapping[str, Any] | None = None
    level: int | None = None


def add(db: Database, chunk: NewChunk, *, replace: bool) -> ChunkRow:
    """Register one chunk; see `ChunkStore.add_chunk`."""
    _check(chunk)
    new_id = chunk_id(chunk.namespace, chunk.level, chunk.text)
    metadata = None if chunk.metadata is None else _metadata_json(chunk.metadata)
    found = list(db.query("select namespace, level, text from chunks where id = ?", [new_id]))
    if not found:
        row = {"id": new_id, "namespace": chunk.namespace, "level": chunk.level, "text": chunk.text}
        db.table("chunks").insert({**row, "metadata": metadata or "{}", "created": now()})
        touch(db, [new_id])
    elif found[0] != {"namespace": chunk.namespace, "level": chunk.level, "text": chunk.text}:
        raise HashCollisionError(
            f"The id {new_id} must be free or stand for this text; another text has it. Change the text by a "
            "character, for example add a space inside."
        )
    elif metadata is not None:
        _set(db, new_id, "metadata", metadata)
    if chunk.name is not None:
        _name(db, chunk.namespace, chunk.name, new_id, replace=replace)
    return _rows(db, "id = ?", [new_id], asked={new_id: chunk.name})[0]


def find(db: Database, namespace: str, name_or_id: str) -> ChunkRow | None:
    """Return the chunk of that name in the namespace, else the one of that id, else None."""
    return find_named(db, namespace, [name_or_id]).get(name_or_id)


def find_named(db: Database, namespace: str, names_or_ids: Iterable[str]) -> dict[str, ChunkRow]:
    """Return the namespace's chunks of these names, else ids, by the name or id. Unknown ones are left out. A chunk
    that is asked for by a name carries that name."""
    wanted = list(dict.fromkeys(map(_bindable, names_or_ids)))
    named: dict[str, str] = {}
    for part in parts(wanted):
        query = f"select name, chunk_id from names where namespace = ? and name in ({placeholders(part)})"
        named.update((row["name"], row["chunk_id"]) for row in db.query(query, [namespace, *part]))
    rows = find_many(db, namespace, [named.get(each, each) for each in wanted])
    found: dict[str, ChunkRow] = {}
    for each in wanted:
        if row := rows.get(named.get(each, each)):
            found[each] = replace(row, name=each) if each in named else row
    return found


def find_many(db: Database, namespace: str, ids: Iterable[str]) -> dict[str, ChunkRow]:
    """Return the namespace's chunks of these ids, by id. Unknown ids are left out."""
    found: dict[str, ChunkRow] = {}
    for part in parts(list(dict.fromkeys(ids))):
        rows = _rows(db, f"number in ({_numbers(part)})", [*part, namespace])
        found.update((row.id, row) for row in rows)
    return found


def known(db: Database, namespace: str, ids: Iterable[str]) -> set[str]:
    """Return those of the ids that are registered in the namespace."""
    found: set[str] = set()
    for part in parts(list(dict.fromkeys(ids))):
        found.update(row[0] for row in db.execute(_numbers(part, "id"), [*part, namespace]))
    return found


def select(
    db: Database, namespace: str, which: ChunkFilter, *, limit: int | None = None, after: str | None = None
) -> list[ChunkRow]:
    """Return the namespace's chunks that pass the filter, in the order of registration.

    Args:
        db: the open index.
        namespace: the namespace of the chunks.
        which: the filter. If it has a name, each chunk carries the first of its names that fits.
        limit: the most chunks to return; None means all.
        after: id of a chunk. Only chunks that were registered after it are returned.
    """
    where, arguments = _condition(namespace, which)
    if after is not None:
        where += f" and number > ({_numbers([after])})"
        arguments += [_bindable(after), namespace]
    return _rows(db, where, arguments, limit=limit, named=which.name)


def count(db: Database, namespace: str, which: ChunkFilter) -> int:
    """Return how many chunks of the namespace pass the filter. Reads no text."""
    where, arguments = _condition(namespace, which)
    return int(next(db.query(f"select count(*) as n from chunks where {where}", arguments))["n"])


def update(
    db: Database,
    row: ChunkRow,
    *,
    name: str | None,
    metadata: Mapping[str, Any] | None,
    replace: bool,
    pinned: bool | None = None,
) -> ChunkRow:
    """Give a chunk metadata in place of what it has, one more name, or a pin. See `ChunkStore.update_chunk`."""
    check_name(name)
    if metadata is not None:
        _set(db, row.id, "metadata", _metadata_json(metadata))
    if pinned is not None:
        _set(db, row.id, "pinned", int(pinned))
    if name is not None:
        _name(db, row.namespace, name, row.id, replace=replace)
    return _rows(db, "id = ?", [row.id], asked={row.id: name or row.name})[0]


def close_names(db: Database, namespace: str, name: str) -> list[str]:
    """Return up to three names of the namespace that resemble `name`, the closest first."""
    rows = db.query(
        "select name from names where namespace = ? and length(name) between ? and ? order by number desc limit ?",
        [namespace, len(name) // 2, len(name) * 2 + 2, SUGGEST_AMONG],
    )
    return difflib.get_close_matches(name, [row["name"] for row in rows], n=3, cutoff=0.6)


def owners(db: Database, ids: Iterable[str]) -> dict[str, str | None]:
    """Return the namespace of the chunk with each id, or None if it is not registered."""
    found: dict[str, str | None] = dict.fromkeys(map(_bindable, ids))
    for part in parts(list(found)):
        rows = db.table("chunks").rows_where(f"id in ({placeholders(part)})", [*part], select="id, namespace")
        found.update((row["id"], row["namespace"]) for row in rows)
    return found


def touch(db: Database, ids: Iterable[str]) -> None:
    """Mark chunks as changed, so that their files are written again or removed; see `catalogue.py`."""
    db.conn.executemany("insert or replace into stale values (?, random())", [(each,) for each in ids])


def touch_all(db: Database) -> None:
    """Mark all chunks as changed."""
    db.execute("insert or replace into stale select id, random() from chunks")


def versions(db: Database, namespace: str, name: str) -> list[NameVersion]:
    """Return what a name stands for and stood for, the newest first. There is none for an unknown name."""
    query = "select chunk_id, since, {} as until from {} where namespace = ? and name = ? order by number desc"
    found = [
        row
        for until, table in (("null", "names"), ("until", "former_names"))
        for row in db.query(query.format(until, table), [namespace, _bindable(name)])
    ]
    return [NameVersion(**row) for row in found]


def restore(db: Database, namespace: str, name: str, wanted: str | None) -> ChunkRow:
    """Let a name stand again for a chunk that it stood for; see `ChunkStore.restore_name`."""
    known_versions = versions(db, namespace, name)
    present = {each.chunk_id for each in known_versions if each.until is None}
    before = [each.chunk_id for each in known_versions if each.chunk_id not in present]
    found = next((each for each in before if wanted in (None, each)), None)
    if found is None:
        known = f"it stood for {', '.join(dict.fromkeys(before[:5]))}" if before else "no other is known"
        raise UnknownChunkError(
            f"The name {shown(name)} in namespace {shown(namespace)} must have stood for "
            f"{f'chunk {shown(wanted)}' if wanted else 'another chunk before'}; {known}. Look at its history: "
            "chunks.history(name), or `braid log NAME`."
        )
    return update(db, find_many(db, namespace, [found])[found], name=name, metadata=None, replace=True)


def delete(db: Database, ids: Sequence[str]) -> None:
    """Delete the rows and names of chunks. Their entries must be deleted before."""
    touch(db, ids)
    for part in parts(ids):
        db.table("chunks").delete_where(f"id in ({placeholders(part)})", [*part])


def now() -> str:
    """The current time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat()


def parts(items: Sequence[str]) -> Iterable[Sequence[str]]:
    """Cut a sequence into pieces that fit one query's parameters."""
    return (items[start : start + PARAMETERS] for start in range(0, len(items), PARAMETERS))


def placeholders(items: Sequence[str]) -> str:
    """Return as many question marks as there are items."""
    return ",".join("?" * len(items))


def _numbers(ids: Sequence[str], column: str = "number") -> str:
    """A query for the numbers of a namespace's chunks with these ids. Its parameters are the ids and the namespace."""
    return f"select {column} from chunks indexed by {ID_INDEX} where id in ({placeholders(ids)}) and namespace = ?"


def _check(chunk: NewChunk) -> None:
    if not chunk.text:
        raise EmptyTextError("A chunk's text must not be empty; got none. Register text with at least one character.")
    if not chunk.namespace:
        raise InputError('namespace must not be empty; got "". Leave it out for the namespace "default".')
    if not isinstance(chunk.level, int) or not 0 <= chunk.level <= 2:
        raise InputError(f"level must be 0 (system), 1 (context) or 2 (query); got {chunk.level!r}.")
    check_name(chunk.name)


def check_name(name: str | None) -> None:
    """Refuse what can't be a chunk's name. None is no name.

    Raises:
        InputError: it is not text, blank, too long, or looks like an id.
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise InputError(f"name must be text; got a {type(name).__name__}. Pass a str, or leave it out.")
    _bindable(name)
    if not name.strip() or len(name) > NAME_LIMIT:
        raise InputError(
            f"name must have 1 to {NAME_LIMIT} characters; got {len(name)}{'' if name.strip() else ' blank ones'}. "
            "Choose another name, or leave it out."
        )
    if looks_like_chunk_id(name):
        raise InputError(
            f"name must not look like a chunk's id; got 32 hex digits ({name}). Put a letter from g to z before it."
        )


def _condition(namespace: str, which: ChunkFilter) -> tuple[str, list[Any]]:
    """The filter as SQL. SQLite answers it from indexes and reads no text."""
    # A plus keeps SQLite from scanning the namespace if the names that fit lead to the few chunks that are wanted.
    plus = "+" if which.name is not None else ""
    where = f"{plus}namespace = ?"
    arguments: list[Any] = [namespace]
    if which.level is not None:
        where += f" and {plus}level = ?"
        arguments.append(which.level)
    if which.name is not None:
        where += " and id in (select chunk_id from names where namespace = ? and name glob ?)"
        arguments += [namespace, _glob(which.name)]
    for key, value in (which.metadata or {}).items():
        kinds = _json_types(key, value)
        where += (
            f" and number in (select other.number from chunks as other indexed by {METADATA_INDEX} where "
            "other.namespace = ? and other.metadata <> '{}' and exists "
            "(select 1 from json_each(other.metadata) as each where each.key = ? and each.value is ? and "
            f"each.type in ({placeholders(kinds)})))"
        )
        arguments += [namespace, _bindable(key), value, *kinds]
    return where, arguments


def _glob(pattern: str) -> str:
    if not isinstance(pattern, str):
        raise InputError(f"name must be text such as 'guide*'; got a {type(pattern).__name__}. Pass a str.")
    return _bindable(pattern.replace("[!", "[^"))  # "none of these" as the shell writes it, and as SQLite does


def _json_types(key: object, value: object) -> tuple[str, ...]:
    """JSON's names for a value's type, if values of the type can be looked for."""
    if not isinstance(key, str):
        raise InputError(
            f"Keys of metadata to look for must be text; got a {type(key).__name__}. Pass the keys as they were stored."
        )
    match value:
        case None:
            return ("null",)
        case bool():
            return ("true",) if value else ("false",)
        case int() | float():
            if value != value or abs(value) >= 2**63:
                raise InputError(
                    f"A number to look for in metadata must fit into 64 bits; got another under {key[:80]!r}. Store "
                    "it as text, and look for that."
                )
            return ("integer", "real")
        case str():
            _bindable(value)
            return ("text",)
    raise InputError(
        f"Metadata to look for must be text, a number, a bool or None; got a {type(value).__name__} under "
        f"{shown(key)}. Compare lists and objects in your own code."
    )


def _set(db: Database, ident: str, column: str, value: object) -> None:
    db.execute(f"update chunks set {column} = ? where id = ?", [value, ident])
    touch(db, [ident])


def _name(db: Database, namespace: str, name: str, new_id: str, *, replace: bool) -> None:
    taken = list(db.query("select * from names where namespace = ? and name = ?", [namespace, name]))
    when = now()
    if taken and taken[0]["chunk_id"] == new_id:
        return
    if taken and not replace:
        raise NameTakenError(
            f"The name {shown(name)} must be free in namespace {shown(namespace)} or stand for this text; it "
            f"stands for chunk {taken[0]['chunk_id']}. Pass replace=True to move the name, or choose another."
        )
    row = {"namespace": namespace, "name": name, "chunk_id": new_id, "since": when}
    if not taken:
        db.table("names").insert(row)
    else:
        before = taken[0]
        later = next(db.query("select max(number) + 1 as number from names"))
        db.table("names").update(before.pop("number"), {**row, **later})
        db.table("former_names").insert({**before, "until": when})
        ended = (
            "from former_names where namespace = ? and name = ? order by number desc limit -1 offset ?",
            [namespace, name, FORMER_NAMES],
        )
        forgotten = list(db.query(f"select number, chunk_id {ended[0]}", ended[1]))
        db.conn.executemany("delete from former_names where number = ?", [(each["number"],) for each in forgotten])
        touch(db, [before["chunk_id"], *(each["chunk_id"] for each in forgotten)])
    touch(db, [new_id])


def _rows(
    db: Database,
    where: str,
    arguments: list[Any],
    *,
    asked: Mapping[str, str | None] | None = None,
    limit: int | None = None,
    named: str | None = None,
) -> list[ChunkRow]:
    """Read chunks with their names, in the order of registration, and check each text against its id.

    A chunk carries the name in `asked`, else its first name that fits the pattern `named`, else its first name.
    """
    columns = "id, namespace, level, text, metadata, pinned"
    query = f"select {columns} from chunks where {where} order by number limit ?"
    found = list(db.query(query, [*arguments, -1 if limit is None else limit]))
    names: dict[str, list[str]] = {}
    fitting: dict[str, str] = {}
    pattern = "0" if named is None else "name glob ?"
    for part in parts([row["id"] for row in found]):
        query = f"select chunk_id, name, {pattern} as fits from names where chunk_id in ({placeholders(part)})"
        for row in db.query(f"{query} order by number", [*([] if named is None else [_glob(named)]), *part]):
            names.setdefault(row["chunk_id"], []).append(row["name"])
            if row["fits"]:
                fitting.setdefault(row["chunk_id"], row["name"])
    rows = []
    for row in found:
        if chunk_id(row["namespace"], row["level"], row["text"]) != row["id"]:
            raise StoreCorruptError(
                f"The id of chunk {row['id']} must be the hash of its text; the index holds another text. {REPAIR}"
            )
        own = tuple(names.get(row["id"], ()))
        name = (asked or fitting).get(row["id"]) or (own[0] if own else None)
        metadata = {} if row["metadata"] == "{}" else check_stored_metadata(row["id"], row["metadata"])
        rows.append(
            ChunkRow(row["id"], row["namespace"], row["level"], row["text"], name, own, metadata, bool(row["pinned"]))
        )
    return rows


def check_stored_metadata(ident: str, text: str) -> dict[str, Any]:
    """The metadata of a row or of a file, which may come from anyone.

    Raises:
        StoreCorruptError: they are not what can be registered.
    """
    try:
        found = json.loads(text, parse_constant=_refused)
        if isinstance(found, dict) and not _is_deep(found):
            return found
    except (ValueError, RecursionError):
        pass
    raise StoreCorruptError(
        f"The metadata of chunk {ident} must be a JSON object of at most {METADATA_DEPTH} levels; the index holds "
        f"something else. {REPAIR}"
    )


def _refused(constant: str) -> None:
    raise ValueError(constant)


def _is_deep(value: Any) -> bool:
    """Whether a value has more levels than metadata may have."""
    level = [value]
    for _ in range(METADATA_DEPTH):
        inner = (each.values() if isinstance(each, Mapping) else each for each in level)
        level = [one for each in inner for one in each if isinstance(one, Mapping | list | tuple)]
        if not level:
            return False
    return True


def _metadata_json(metadata: Mapping[str, Any]) -> str:
    if not isinstance(metadata, Mapping):
        raise InputError(f"metadata must be a mapping; got a {type(metadata).__name__}. Pass a dict.")
    if _is_deep(metadata):
        raise InputError(
            f"metadata must have at most {METADATA_DEPTH} levels of lists and objects; got more. Flatten it, or store "
            "it as text."
        )
    try:
        return _bindable(json.dumps(dict(metadata), ensure_ascii=True, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise InputError(
            f"metadata must hold plain JSON values; got {_not_json(metadata)}. Convert it first, for example with "
            "str(), or leave it out."
        ) from None


def _not_json(metadata: Mapping[str, Any]) -> str:
    """Name the first value that is not JSON."""
    for key, value in metadata.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            what = "NaN or infinity" if isinstance(value, float) else f"a {type(value).__name__}"
            return f"{what} under {shown(key)}"
    return "a value that isn't"


def _bindable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            "A name or an id must hold whole Unicode characters; got half a surrogate pair. Decode it with "
            "errors='replace' where it is read."
        ) from None
    return text
