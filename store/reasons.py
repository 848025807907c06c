"""Says why a look-up missed: it finds the closest stored entry of the same namespace, and names what differs.

It never tells anything about another namespace's entries, not even that there are any. It runs inside the caller's
transaction and only reads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from braidsdk.store.chunks import parts, placeholders
from braidsdk.store.keys import EntryKey, differences
from braidsdk.types import LEVEL_OVERLAY

CANDIDATES = 64
"""The most stored entries of one chunk that are compared, the newest first. A chunk may be part of many chains."""

_NEWEST = f"""
    select found_by, digest, record from (
        select {{column}} as found_by, digest, record,
            row_number() over (partition by {{column}} order by rowid desc) as nth
        from entries where namespace = ? and level <> {LEVEL_OVERLAY} and {{where}}
    ) where nth <= ?
"""


@dataclass(frozen=True)
class Miss:
    """Why an entry was not found.

    Attributes:
        reason: "absent" (never computed), "version", "model", "tokenizer", "dtype", "codec", "rope", "level",
            "after" (computed only after something else), "tokens" (the same text gave other token ids), "collision"
            (another entry has the same digest), or "damaged" (its file was set aside).
        detail: one sentence for people.
    """

    reason: str
    detail: str


def explain(db: Database, keys: Sequence[EntryKey]) -> list[Miss]:
    """Say for each key why the store has no entry for it. Only entries of its own namespace are used.

    An entry that was stored after the look-up is ignored.
    """
    there = _there(db, [key.digest for key in keys])
    damaged = _damaged(db, [key.digest for key in keys])
    by_chunk: dict[tuple[str, str | None], dict[str, str]] = {}
    by_tokens: dict[tuple[str, str | None], dict[str, str]] = {}
    for namespace in dict.fromkeys(key.namespace for key in keys):
        own_keys = [key for key in keys if key.namespace == namespace]
        by_chunk |= _newest(db, namespace, "chunk_id", [key.chunk_id for key in own_keys])
        by_tokens |= _newest(db, namespace, "tokens_sha256", [key.token_sha256 for key in own_keys])
    misses = []
    for key in keys:
        if there.get(key.digest, (key.record_json, key.token_sha256)) != (key.record_json, key.token_sha256):
            misses.append(Miss("collision", "another entry has the same digest; this one can't be stored beside it"))
        elif key.digest in damaged:
            misses.append(Miss("damaged", f"its file was set aside: {damaged[key.digest]}"))
        else:
            own = by_chunk.get((key.namespace, key.chunk_id), {})
            misses.append(_closest(key, own, by_tokens.get((key.namespace, key.token_sha256), {})))
    return misses


def _closest(key: EntryKey, own: Mapping[str, str], same_tokens: Mapping[str, str]) -> Miss:
    wanted = key.record()
    # The same chunk id means the same text. The same token ids count only if they belong to another level.
    candidates = [json.loads(record) for digest, record in own.items() if digest != key.digest]
    candidates += [record for record in map(json.loads, same_tokens.values()) if record["level"] != key.level]
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


def _newest(
    db: Database, namespace: str, column: str, values: Sequence[str | None]
) -> dict[tuple[str, str | None], dict[str, str]]:
    """Return the namespace's newest records, by their digests, for each value of a column. None means null."""
    wanted = list(dict.fromkeys(value for value in values if value is not None))
    conditions = [(f"{column} in ({placeholders(part)})", part) for part in parts(wanted)]
    if None in values:
        conditions.append((f"{column} is null", []))
    found: dict[tuple[str, str | None], dict[str, str]] = {}
    for where, arguments in conditions:
        for row in db.query(_NEWEST.format(column=column, where=where), [namespace, *arguments, CANDIDATES]):
            found.setdefault((namespace, row["found_by"]), {})[row["digest"]] = row["record"]
    return found


def _there(db: Database, digests: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the record and the hash of the tokens for each entry that has one of these digests."""
    found: dict[str, tuple[str, str]] = {}
    for part in parts(list(dict.fromkeys(digests))):
        rows = db.table("entries").rows_where(
            f"digest in ({placeholders(part)})", part, select="digest, record, tokens_sha256"
        )
        found.update((row["digest"], (row["record"], row["tokens_sha256"])) for row in rows)
    return found


def _damaged(db: Database, digests: Sequence[str]) -> dict[str, str]:
    found: dict[str, Any] = {}
    for part in parts(list(dict.fromkeys(digests))):
        rows = db.table("damage").rows_where(
            f"digest in ({placeholders(part)})", part, select="digest, why", order_by="number"
        )
        found.update((row["digest"], row["why"]) for row in rows)
    return found
