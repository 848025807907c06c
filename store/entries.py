"""KV entries as rows of the index.

Each function takes the open index and runs inside the caller's transaction. Reads and writes no entry's file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from braidsdk.store import reasons
from braidsdk.store.blobs import Slab
from braidsdk.store.chunks import now, parts, placeholders
from braidsdk.store.keys import EntryKey
from braidsdk.store.reasons import Miss


@dataclass(frozen=True)
class Hit:
    """An entry that the index knows.

    Attributes:
        digest: the key's digest.
        tokens: its tokens.
        nbytes: bytes of KV, all layers.
        path: its file.
    """

    digest: str
    tokens: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class Entry:
    """An entry read and verified.

    Attributes:
        key: the key that it was asked for by.
        slabs: one per layer, writable views of one buffer.
        page_size: tokens per page.
        nbytes: bytes of KV, all layers.
        provenance: what computed it.
    """

    key: EntryKey
    slabs: tuple[Slab, ...]
    page_size: int
    nbytes: int
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class EntryRow:
    """What the index keeps of an entry."""

    digest: str
    chunk_id: str | None
    record: str
    tokens_sha256: str
    tokens: int
    bytes: int
    file: str
    payload_digest: str
    chunks: tuple[str, ...]


def look_up(db: Database, keys: Sequence[EntryKey], root: Path) -> list[Hit | Miss]:
    """Return a hit or the reason of the miss for each key, in order."""
    rows: dict[str, dict[str, Any]] = {}
    for part in parts(list(dict.fromkeys(key.digest for key in keys))):
        found = db.table("entries").rows_where(f"digest in ({placeholders(part)})", part)
        rows.update((row["digest"], row) for row in found)
    absent = [key for key in keys if key.digest not in rows]
    misses = dict(zip((id(key) for key in absent), reasons.explain(db, absent), strict=True)) if absent else {}
    return [misses[id(key)] if key.digest not in rows else _hit(key, rows[key.digest], root) for key in keys]


def known(db: Database, digests: Iterable[str]) -> set[str]:
    """Return those of the digests that the index has an entry for."""
    found: set[str] = set()
    for part in parts(list(dict.fromkeys(digests))):
        rows = db.table("entries").rows_where(f"digest in ({placeholders(part)})", part, select="digest")
        found.update(row["digest"] for row in rows)
    return found


def all_digests(db: Database) -> set[str]:
    """Return the digests of all entries."""
    return {row["digest"] for row in db.table("entries").rows_where(select="digest")}


def insert(db: Database, rows: Sequence[EntryRow]) -> None:
    """Add entries; their chunks must be registered, their digests unknown."""
    created = now()
    fields = ("digest", "chunk_id", "record", "tokens_sha256", "tokens", "bytes", "file", "payload_digest")
    db.table("entries").insert_all(
        [{name: getattr(row, name) for name in fields} | {"created": created} for row in rows]
    )
    saw = [{"digest": row.digest, "chunk_id": chunk} for row in rows for chunk in row.chunks]
    if saw:
        db.table("entry_chunks").insert_all(saw)


def delete_of_chunk(db: Database, chunk_id: str) -> list[str]:
    """Delete every entry computed with sight of a chunk, its own included, and return their digests."""
    rows = db.table("entry_chunks").rows_where("chunk_id = ?", [chunk_id], select="digest", order_by="rowid")
    digests = [row["digest"] for row in rows]
    for part in parts(digests):
        db.table("entries").delete_where(f"digest in ({placeholders(part)})", part)
    return digests


def delete_damaged(db: Database, digest: str, *, file: str | None, why: str) -> bool:
    """Move an entry's row to the record of damage; False if the row is gone already."""
    chunks = [row["chunk_id"] for row in db.table("entry_chunks").rows_where("digest = ?", [digest])]
    if not known(db, [digest]):
        return False
    db.table("entries").delete(digest)
    record_damage(db, digest, chunks=chunks, file=file, why=why)
    return True


def record_damage(db: Database, digest: str, *, chunks: Sequence[str], file: str | None, why: str) -> None:
    """Count a file set aside; `file` is its new place in damaged/, None where it was missing."""
    row = {"digest": digest, "chunks": json.dumps(list(chunks)), "file": file, "why": why, "created": now()}
    db.table("damage").insert(row)


def forget_damaged(db: Database, chunk_id: str) -> list[str]:
    """Forget what was set aside of a chunk, but not that it was, and return the files' names in damaged/."""
    condition = "exists (select 1 from json_each(damage.chunks) where value = ?)"
    rows = list(db.table("damage").rows_where(condition, [chunk_id], select="number, file"))
    for row in rows:
        db.table("damage").update(row["number"], {"digest": "", "chunks": "[]", "file": None})
    return [row["file"] for row in rows if row["file"] is not None]


def _hit(key: EntryKey, row: Mapping[str, Any], root: Path) -> Hit | Miss:
    if row["record"] != key.record_json or row["tokens_sha256"] != key.token_sha256:
        return Miss("collision", "another entry has the same digest; this one can't be stored beside it")
    return Hit(key.digest, row["tokens"], row["bytes"], root / row["file"])
