"""Why a look-up missed: the closest stored entry, and what differs.

Runs inside the caller's transaction, reads only.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from braidsdk.store.chunks import parts, placeholders
from braidsdk.store.keys import EntryKey, differences

CANDIDATES = 64
"""Stored entries of one chunk that are compared at most, the newest first: a chunk may be part of many chains."""

_NEWEST = """
    select {column} as found_by, record from (
        select {column}, record, row_number() over (partition by {column} order by rowid desc) as nth
        from entries where {where}
    ) where nth <= ?
"""


@dataclass(frozen=True)
class Miss:
    """An entry that can't be had.

    Attributes:
        reason: "absent" (never computed), "version", "model", "tokenizer", "dtype", "codec", "rope", "namespace",
            "level", "after" (computed only after something else), "tokens" (the same text gave other token ids),
            "collision" (another entry has the same digest), or "damaged" (its file was set aside).
        detail: one sentence for people.
    """

    reason: str
    detail: str


def explain(db: Database, keys: Sequence[EntryKey]) -> list[Miss]:
    """Say for each key why the store has no entry of it."""
    damaged = _damaged(db, [key.digest for key in keys])
    by_chunk = _newest(db, "chunk_id", [key.chunk_id for key in keys if key.chunk_id is not None])
    by_tokens = _newest(db, "tokens_sha256", [key.token_sha256 for key in keys])
    headers: list[str] = []
    if any(key.chunk_id is None for key in keys):
        headers = [
            row["record"] for row in db.query(_NEWEST.format(column="chunk_id", where="chunk_id is null"), [CANDIDATES])
        ]
    misses = []
    for key in keys:
        if key.digest in damaged:
            misses.append(Miss("damaged", f"its file was set aside: {damaged[key.digest]}"))
            continue
        own = headers if key.chunk_id is None else by_chunk.get(key.chunk_id, [])
        misses.append(_closest(key, own, by_tokens.get(key.token_sha256, [])))
    return misses


def _closest(key: EntryKey, own: Iterable[str], same_tokens: Iterable[str]) -> Miss:
    wanted = key.record()
    # The same chunk id is the same text; the same token ids count only where another namespace or level has them.
    candidates = [json.loads(record) for record in own]
    candidates += [
        record
        for record in map(json.loads, same_tokens)
        if (record["namespace"], record["level"]) != (key.namespace, key.level)
    ]
    best: tuple[tuple[int, int], Miss] | None = None
    for rank, found in enumerate(candidates):
        named = differences(wanted, found)
        if not named:
            miss = Miss("tokens", "the same text gave other token ids when it was computed")
        else:
            others = ", ".join(difference.reason for difference in named[1:])
            miss = Miss(named[0].reason, named[0].words + (f" (differs also in: {others})" if others else ""))
        if best is None or (len(named), rank) < best[0]:
            best = ((len(named), rank), miss)
    return best[1] if best else Miss("absent", "never computed in this store")


def _newest(db: Database, column: str, values: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in parts(list(dict.fromkeys(values))):
        sql = _NEWEST.format(column=column, where=f"{column} in ({placeholders(part)})")
        for row in db.query(sql, [*part, CANDIDATES]):
            found.setdefault(row["found_by"], []).append(row["record"])
    return found


def _damaged(db: Database, digests: Sequence[str]) -> dict[str, str]:
    found: dict[str, Any] = {}
    for part in parts(list(dict.fromkeys(digests))):
        rows = db.table("damage").rows_where(
            f"digest in ({placeholders(part)})", part, select="digest, why", order_by="number"
        )
        found.update((row["digest"], row["why"]) for row in rows)
    return found
