"""Hashes of which 8 bits are left: thousands of texts and keys share one, and none gets what belongs to another."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from braidsdk.errors import HashCollisionError
from braidsdk.store import ChunkRow, ChunkStore, EntryKey, sha256_of_tokens

BATCH = 250
"""Entries that are published or loaded by one call."""


def few_bits(data: bytes) -> str:
    return f"{xxhash.xxh3_64_intdigest(data) % 256:032x}"


@pytest.fixture(params=["ids and digests", "digests"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Cuts the ids of chunks and the digests of entries, or the digests alone. The digests in files stay whole."""

    def chunk_id(namespace: str, level: int, text: str) -> str:
        return few_bits(f"{level}:{namespace}:{text}".encode())

    def digest_of(record: str, tokens: bytes) -> str:
        return few_bits(record.encode() + tokens)

    for module in ("keys", "rebuild"):
        monkeypatch.setattr(f"braidsdk.store.{module}.digest_of", digest_of)
    if request.param == "ids and digests":
        for module in ("keys", "rebuild", "chunks"):
            monkeypatch.setattr(f"braidsdk.store.{module}.chunk_id", chunk_id)
    return str(request.param)


def registered(store: ChunkStore, texts: list[str], seen: Counter[str]) -> dict[int, ChunkRow]:
    """The chunks that could be registered, each under its number. Errors that come are typed."""
    rows: dict[int, ChunkRow] = {}
    for number, text in enumerate(texts):
        try:
            rows[number] = store.add_chunk(namespace="default", level=1, text=text, name=f"name {number}")
        except HashCollisionError:
            seen["texts refused"] += 1
    seen["texts registered"] = len(rows)
    for number, row in store.find_named("default", [f"name {n}" for n in range(len(texts))]).items():
        seen["wrong"] += row.text != texts[int(number.removeprefix("name "))]
    seen["wrong"] += sum(row.text != texts[number] for number, row in rows.items())
    return rows


def loaded(store: ChunkStore, made: list[EntryKey], make: Any, seen: Counter[str]) -> set[int]:
    """The numbers of the keys that have an entry. A miss is a collision."""
    found = set()
    for start in range(0, len(made), BATCH):
        part = made[start : start + BATCH]
        misses = []
        for number, (hit, entry) in enumerate(zip(store.look_up(part), store.load(part), strict=True), start):
            seen["wrong"] += (hit is None) != (entry is None)
            if entry is None:
                misses.append(made[number])
            else:
                seen["wrong"] += make.content(entry.tensors) != make.content(make.tensors(number))
                found.add(number)
        seen["wrong"] += sum(miss.reason != "collision" for miss in store.explain(misses))
    return found


def collide(folder: Path, make: Any, count: int) -> Counter[str]:
    """Register texts, publish and load an entry for each number, and again from a rebuilt index; count what happens."""
    seen: Counter[str] = Counter()
    with ChunkStore(folder) as store:
        rows = list(
            registered(store, [f"House {n} has number {n * 37 % 1009}.\n" for n in range(count)], seen).values()
        )
        made = [
            make.key(rows[n % len(rows)].id, tokens=(n + 1, 7), after=(None,), after_sha256=sha256_of_tokens([n]))
            for n in range(count)
        ]
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            store.publish([(made[n], make.tensors(n), {}) for n in numbers])
        found = loaded(store, made, make, seen)
        seen["entries"], seen["keys without one"] = len(found), count - len(found)
        seen["wrong"] += store.damaged_count
    (folder / "index.db").unlink()
    with ChunkStore(folder) as store:
        seen["wrong"] += loaded(store, made, make, seen) != found
        gone = {digest for row in rows[::2] for digest in store.delete_chunk("default", row.id)}
        for number in found:
            (entry,) = store.load([made[number]])
            seen["wrong"] += (entry is None) != (made[number].digest in gone)
            seen["wrong"] += entry is not None and make.content(entry.tensors) != make.content(make.tensors(number))
    return seen


def test_no_text_and_no_entry_is_taken_for_another(folder: Path, make: Any, cut: str) -> None:
    seen = collide(folder, make, 400)
    assert seen["wrong"] == 0
    assert seen["entries"] > 200


@pytest.mark.campaign
def test_no_text_and_no_entry_of_very_many_is_taken_for_another(
    folder: Path, make: Any, cut: str, counted: Callable[..., None]
) -> None:
    seen = collide(folder, make, 5000)
    counted(f"chunks and entries with 8 bits left of {cut}", 5000, wrong=seen["wrong"])
    assert seen["wrong"] == 0
    assert seen["entries"] > 200
