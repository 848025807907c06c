"""KV entries as rows of the index.

Each function takes the open index and runs inside the caller's transaction. None reads or writes an entry's file.

An entry's worth says how often it was used per byte, where a use counts half after `HALF_LIFE` more uses of any entry:
log2(sum over its uses of 2^(n / HALF_LIFE)) - log2(size), where n is the number of uses of all entries until then. No
clock is in it, and it does not change as others are used: so it is kept as a number, in an index.
"""

import json
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from braidsdk.store import memory
from braidsdk.store.blobs import Tensors
from braidsdk.store.chunks import now, parts, placeholders
from braidsdk.store.files import Layout, entry_name
from braidsdk.store.keys import EntryKey, record_chunk_ids
from braidsdk.store.schema import MODELS_INDEX

HALF_LIFE = 4096.0
"""After so many uses of any entry, a use counts half."""

USES = "uses"
"""The key under which the store remembers how many uses of entries there were."""


@dataclass(frozen=True)
class Hit:
    """An entry that the index knows.

    Attributes:
        digest: the key's digest.
        tokens: number of its tokens.
        nbytes: bytes of KV, all layers.
        path: its file.
        payload_digest: the digest of its file's header, which covers everything in the file.
    """

    digest: str
    tokens: int
    nbytes: int
    path: Path
    payload_digest: str


@dataclass(frozen=True)
class Entry:
    """An entry that was read and verified.

    Attributes:
        key: the key that was asked for.
        tensors: its tensors, in memory of their own or in the caller's.
        nbytes: bytes of KV, all layers.
        provenance: what computed it.
    """

    key: EntryKey
    tensors: Tensors
    nbytes: int
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class EntryGroup:
    """How many entries of one model, dtype and level there are, and their bytes of KV.

    Attributes:
        weights: fingerprint of the model's weights.
        dtype: the dtype that they were computed in.
        level: the level of their chunks.
        entries: how many entries there are.
        bytes: size of their KV.
    """

    weights: str
    dtype: str
    level: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class EntryRow:
    """What the index keeps of an entry."""

    digest: str
    chunk_id: str | None
    record: str
    tokens_sha256: str
    tokens: int
    bytes: int
    size: int
    payload_digest: str
    chunks: tuple[str, ...]


def look_up(db: Database, keys: Sequence[EntryKey], layout: Layout) -> list[Hit | None]:
    """Return for each key, in order, what the index knows about its entry. None means nothing."""
    rows: dict[str, dict[str, Any]] = {}
    for part in parts(list(dict.fromkeys(key.digest for key in keys))):
        found = db.table("entries").rows_where(f"digest in ({placeholders(part)})", part)
        rows.update((row["digest"], row) for row in found)
    return [_hit(key, rows[key.digest], layout) if key.digest in rows else None for key in keys]


def known(db: Database, digests: Iterable[str]) -> set[str]:
    """Return those of the digests that the index has an entry for."""
    found: set[str] = set()
    for part in parts(list(dict.fromkeys(digests))):
        rows = db.table("entries").rows_where(f"digest in ({placeholders(part)})", part, select="digest")
        found.update(row["digest"] for row in rows)
    return found


def all_digests(db: Database) -> set[str]:
    """Return the digests of all entries."""
    return {digest for (digest,) in db.execute("select digest from entries")}


def insert(db: Database, rows: Sequence[EntryRow]) -> None:
    """Add entries, each with one use. Their chunks must be registered, and their digests must be new."""
    created, used, uses = now(), int(time.time()), _uses(db)
    fields = ("digest", "chunk_id", "record", "tokens_sha256", "tokens", "bytes", "size", "payload_digest")
    full = [
        {name: getattr(row, name) for name in fields}
        | _copied(row)
        | {"worth": uses / HALF_LIFE - math.log2(row.size), "used": used}
        | {"file": entry_name(row.digest), "created": created}  # `file` is for people; nothing reads it
        for row in rows
    ]
    db.table("entries").insert_all(full)
    saw = [{"digest": row.digest, "chunk_id": chunk} for row in rows for chunk in row.chunks]
    if saw:
        db.table("entry_chunks").insert_all(saw)
    for namespace in {row["namespace"] for row in full}:
        own = [row["size"] for row in full if row["namespace"] == namespace]
        _add_to_total(db, namespace, len(own), sum(own))


def delete(db: Database, digests: Sequence[str]) -> None:
    """Delete entries. Unknown ones are ignored."""
    for part in parts(digests):
        marks = placeholders(part)
        query = f"select namespace, count(*), sum(size) from entries where digest in ({marks}) group by namespace"
        for namespace, count, size in db.execute(query, [*part]).fetchall():
            _add_to_total(db, namespace, -count, -size)
        db.table("entries").delete_where(f"digest in ({marks})", part)


def delete_of_chunks(db: Database, chunk_ids: Sequence[str]) -> dict[str, int]:
    """Delete every entry of these chunks or computed after one, and return the digests with their bytes of KV."""
    deleted: dict[str, int] = {}
    for part in parts(chunk_ids):
        rows = db.query(
            "select digest, bytes from entries where digest in "
            f"(select digest from entry_chunks where chunk_id in ({placeholders(part)})) order by rowid",
            [*part],
        )
        deleted.update((row["digest"], row["bytes"]) for row in rows)
    delete(db, list(deleted))
    return deleted


def delete_damaged(db: Database, digest: str, *, file: str | None, why: str) -> bool:
    """Move an entry's row to the record of damage. Returns False if the row was gone already."""
    chunks = [row["chunk_id"] for row in db.table("entry_chunks").rows_where("digest = ?", [digest])]
    found = list(db.table("entries").rows_where("digest = ?", [digest], select="namespace"))
    if not found:
        return False
    delete(db, [digest])
    record_damage(db, digest, namespace=found[0]["namespace"], chunks=chunks, file=file, why=why)
    return True


def count_uses(db: Database, uses: Mapping[str, int]) -> None:
    """Add uses of entries to their worth. Unknown entries are ignored."""
    before, now_s = _uses(db), int(time.time())
    at = before + sum(uses.values())
    memory.remember(db, {USES: str(at)})
    for part in parts(list(uses)):
        rows = db.execute(f"select digest, worth, size from entries where digest in ({placeholders(part)})", [*part])
        changed = [
            (_sum_log2(worth + math.log2(size), math.log2(uses[digest]) + at / HALF_LIFE) - math.log2(size), digest)
            for digest, worth, size in rows.fetchall()
        ]
        db.conn.executemany(f"update entries set worth = ?, used = {now_s} where digest = ?", changed)


def totals(db: Database) -> dict[str, tuple[int, int]]:
    """Return of each namespace how many entries it has, and the size of their files in bytes."""
    return {row[0]: (row[1], row[2]) for row in db.execute("select namespace, entries, size from totals")}


def evictable(
    db: Database, namespace: str | None, *, unused_since: int | None = None
) -> Iterator[tuple[str, str, int]]:
    """The digests, namespaces and file sizes of entries that no pin keeps, the least worth first. None means all
    namespaces. With `unused_since` only those that were used before, in seconds since 1970."""
    where = "(chunk_id is null or chunk_id not in (select id from chunks where pinned))"
    arguments: list[Any] = []
    if namespace is not None:
        where += " and namespace = ?"
        arguments.append(namespace)
    if unused_since is not None:
        where += " and used < ?"
        arguments.append(unused_since)
    yield from db.execute(f"select digest, namespace, size from entries where {where} order by worth", arguments)


def _add_to_total(db: Database, namespace: str, count: int, size: int) -> None:
    db.execute(
        "insert into totals (namespace, entries, size) values (?, ?, ?) on conflict (namespace) do update set "
        "entries = entries + excluded.entries, size = size + excluded.size",
        [namespace, count, size],
    )


def _uses(db: Database) -> int:
    """How many uses of entries there were. Somebody else may have written nonsense."""
    found = memory.recall(db, [USES]).get(USES, "0")
    return int(found) if found.isdecimal() and len(found) < 19 else 0


def _sum_log2(one: float, other: float) -> float:
    """log2(2^one + 2^other), for numbers of any size."""
    most = max(one, other)
    return most + math.log2(2.0 ** (one - most) + 2.0 ** (other - most))


def record_damage(
    db: Database, digest: str, *, namespace: str, chunks: Sequence[str], file: str | None, why: str
) -> None:
    """Record a file that was set aside. `file` is its new place in damaged/, None if it was missing. `namespace` is ""
    if it is not known."""
    row = {"digest": digest, "namespace": namespace, "chunks": json.dumps(list(chunks))}
    db.table("damage").insert({**row, "file": file, "why": why, "created": now()})


def count_damaged(db: Database, namespace: str) -> int:
    """Return how many files of a namespace were set aside so far, and of those whose namespace is not known."""
    query = "select count(*) from damage where namespace in (?, '')"
    return int(db.execute(query, [namespace]).fetchone()[0])


def forget_damaged(db: Database, chunk_ids: Collection[str]) -> list[str]:
    """Forget which entries of these chunks were set aside, but not how many. Returns the files' names in damaged/, with
    those of which nobody knows whose text they hold."""
    wanted, files = set(chunk_ids), []
    for row in list(
        db.table("damage").rows_where("chunks <> '[]' or file is not null", select="number, namespace, chunks, file")
    ):
        about = json.loads(row["chunks"])
        if wanted.intersection(about) or not (about or row["namespace"]):
            db.table("damage").update(row["number"], {"digest": "", "chunks": "[]", "file": None})
            files += [row["file"]] if row["file"] is not None else []
    return files


def groups(db: Database, namespace: str) -> list[EntryGroup]:
    """Count a namespace's entries and their bytes by model, dtype and level. SQLite needs only one of its indexes for
    that."""
    rows = db.query(
        "select weights, dtype, level, count(*) as entries, sum(bytes) as bytes "
        f"from entries indexed by {MODELS_INDEX} where namespace = ? group by weights, dtype, level",
        [namespace],
    )
    return [EntryGroup(**row) for row in rows]


def of_digest(db: Database, digest: str) -> EntryRow | None:
    """Return what the index keeps of one entry, if it has it."""
    return next(iter(_entry_rows(db, "digest = ?", [digest])), None)


def of_chunk(db: Database, namespace: str, chunk_id: str) -> list[EntryRow]:
    """Return the own entries of a namespace's chunk, oldest first."""
    return _entry_rows(db, "chunk_id = ? and namespace = ?", [chunk_id, namespace])


def of_namespace(db: Database, namespace: str) -> list[EntryRow]:
    """Return a namespace's entries, oldest first."""
    return _entry_rows(db, "namespace = ?", [namespace])


def _entry_rows(db: Database, where: str, arguments: list[str]) -> list[EntryRow]:
    fields = "digest, chunk_id, record, tokens_sha256, tokens, bytes, size, payload_digest"
    found = db.table("entries").rows_where(where, arguments, select=fields, order_by="rowid")
    return [EntryRow(**row, chunks=record_chunk_ids(json.loads(row["record"]))) for row in found]


def _copied(row: EntryRow) -> dict[str, Any]:
    """The fields of an entry's record that have a column of their own."""
    record = json.loads(row.record)
    return {name: record[name] for name in ("namespace", "level")} | {
        name: record["model"][name] for name in ("weights", "dtype")
    }


def _hit(key: EntryKey, row: Mapping[str, Any], layout: Layout) -> Hit | None:
    if row["record"] != key.record_json or row["tokens_sha256"] != key.token_sha256:
        return None  # two keys with one digest
    entry_name(row["payload_digest"])  # raises if it is not a digest
    return Hit(key.digest, row["tokens"], row["bytes"], layout.entry(key.digest), row["payload_digest"])
