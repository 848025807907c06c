"""What is remembered of chunks is never older than the index."""

from collections.abc import Callable
from pathlib import Path

import pytest

from braidsdk.store import ChunkStore, chunks, recent


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often chunks were read from the index so far."""
    count = 0

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            nonlocal count
            count += 1
            return real(*given)

        return call

    for name in ("find_named", "known"):
        monkeypatch.setattr(recent.chunks, name, counting(getattr(chunks, name)))
    return lambda: count


def add(store: ChunkStore, text: str, name: str | None = None, **more: object) -> str:
    return store.add_chunk(namespace="default", level=1, text=text, name=name, **more).id


def test_chunks_are_read_once_while_nobody_writes(store: ChunkStore, reads: Callable[[], int]) -> None:
    one, two = add(store, "one\n", "first"), add(store, "two\n")
    for _ in range(3):
        found = store.find_named("default", ["first", two])
        assert {name: row.text for name, row in found.items()} == {"first": "one\n", two: "two\n"}
        assert store.known_chunks("default", [one, two]) == {one, two}
    assert reads() == 1
    assert store.find_named("default", ["nothing"]) == store.find_named("default", ["nothing"]) == {}
    assert reads() == 3, "what is not there is looked for each time"
    assert store.find_named("other", ["first", two]) == {}
    assert store.known_chunks("other", [one]) == set()


@pytest.mark.parametrize("by_itself", [True, False], ids=["this connection", "another"])
def test_a_write_is_seen_at_once(store: ChunkStore, folder: Path, by_itself: bool) -> None:
    one, two = add(store, "one\n", "name"), add(store, "two\n")
    with ChunkStore(folder) as other:
        writer = store if by_itself else other
        for _ in range(2):
            assert store.find_named("default", ["name"])["name"].id == one
            assert store.known_chunks("default", [one, two]) == {one, two}
        writer.update_chunk("default", two, name="name", metadata={"v": 1}, replace=True)
        assert store.find_named("default", ["name"])["name"].id == two
        assert store.find_named("default", [two])[two].metadata == {"v": 1}
        writer.delete_chunks("default", [two])
        assert store.find_named("default", ["name", two, one]).keys() == {one}
        assert store.known_chunks("default", [one, two]) == {one}
        three = add(writer, "three\n", "name")
        assert store.find_named("default", ["name"])["name"].id == three


def test_metadata_belongs_to_who_asked(store: ChunkStore) -> None:
    add(store, "one\n", "name", metadata={"pages": [1]})
    add(store, "two\n", "none")
    store.find_named("default", ["name"])["name"].metadata["pages"].append(2)  # type: ignore[attr-defined]
    store.find_named("default", ["none"])["none"].metadata["pages"] = 1  # type: ignore[index]
    assert store.find_named("default", ["name"])["name"].metadata == {"pages": [1]}
    assert store.find_named("default", ["none"])["none"].metadata == {}


def test_long_texts_are_forgotten(store: ChunkStore, reads: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "MOST_CHARACTERS", 100)
    ids = [add(store, f"{n}" * 60 + "\n") for n in range(3)]
    for each in (*ids, ids[0]):
        assert store.find_named("default", [each])[each].id == each
    assert reads() == 4
