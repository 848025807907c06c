"""What processes remember in the index for later ones: counts, measured rates, names of models, certificates.

Each function takes the open index and runs inside the caller's transaction. No right answer depends on these values,
and a rebuilt index starts without them.
"""

from collections.abc import Iterable, Mapping

from sqlite_utils import Database

from braidsdk.store.chunks import parts, placeholders


def counters(namespace: str) -> tuple[str, str]:
    """The keys of a namespace's counts of hits and misses, in all processes so far."""
    return f"hits:{namespace}", f"misses:{namespace}"


def recall(db: Database, keys: Iterable[str]) -> dict[str, str]:
    """Return the values of these keys. Unknown keys are left out."""
    found: dict[str, str] = {}
    for part in parts(list(keys)):
        rows = db.table("memory").rows_where(f"key in ({placeholders(part)})", [*part])
        found.update((row["key"], row["value"]) for row in rows)
    return found


def recall_all(db: Database, start: str) -> dict[str, str]:
    """Return the values of all keys that begin with `start`, in the order of the keys."""
    rows = db.table("memory").rows_where("substr(key, 1, ?) = ?", [len(start), start], order_by="key")
    return {row["key"]: row["value"] for row in rows}


def remember(db: Database, values: Mapping[str, str]) -> None:
    """Keep values, in place of what their keys had."""
    db.table("memory").upsert_all([{"key": key, "value": value} for key, value in values.items()], pk="key")


def count(db: Database, counts: Mapping[str, int]) -> None:
    """Add to the counts of these keys. New counts start at 0."""
    for key, more in counts.items():
        db.execute(
            "insert into memory (key, value) values (?, ?) "
            "on conflict (key) do update set value = cast(value as integer) + excluded.value",
            [key, more],
        )
