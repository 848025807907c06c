"""Lists, counts, changes and deletions of many chunks, answered by SQL from indexes; and what a store remembers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from braidsdk.errors import InputError, NameTakenError, StoreError, UnknownChunkError
from braidsdk.store import ChunkStore, NewChunk, schema


@pytest.fixture
def filled(store: ChunkStore) -> ChunkStore:
    """Six chunks, one of them a system prompt, one in another namespace, one with two names."""
    store.add_chunks(
        [
            NewChunk("default", 0, "rules", "rules"),
            NewChunk("default", 1, "one", "guide/1", {"source": "a", "page": 1, "draft": True}),
            NewChunk("default", 1, "two", "guide/2", {"source": "a", "page": 2.0, "draft": False, "gone": None}),
            NewChunk("default", 1, "three", "Guide/3", {"source": "b", "page": "2", "tags": ["x"]}),
            NewChunk("default", 1, "four"),
            NewChunk("other", 1, "five", "guide/5", {"source": "a"}),
            NewChunk("default", 1, "one", "zebra"),
        ]
    )
    return store


@pytest.mark.parametrize(
    ("filters", "texts"),
    [
        ({}, ["rules", "one", "two", "three", "four"]),
        ({"level": 0}, ["rules"]),
        ({"level": 1, "name": "guide*"}, ["one", "two"]),
        ({"name": "*/[12]"}, ["one", "two"]),
        ({"name": "guide/[!1]"}, ["two"]),
        ({"name": "guide/1"}, ["one"]),
        ({"name": "nothing*"}, []),
        ({"metadata": {"source": "a"}}, ["one", "two"]),
        ({"metadata": {"source": "a", "page": 2}}, ["two"]),
        ({"metadata": {"page": "2"}}, ["three"]),
        ({"metadata": {"draft": True}}, ["one"]),
        ({"metadata": {"page": True}}, []),
        ({"metadata": {"gone": None}}, ["two"]),
        ({"metadata": {"never": None}}, []),
        ({"metadata": {}}, ["rules", "one", "two", "three", "four"]),
        ({"metadata": {"source": "a"}, "name": "zeb?a", "level": 1}, ["one"]),
    ],
    ids=str,
)
def test_filters(filled: ChunkStore, filters: dict[str, Any], texts: list[str]) -> None:
    assert [row.text for row in filled.list_chunks("default", **filters)] == texts
    assert filled.count_chunks("default", **filters) == len(texts)


def test_a_chunk_found_by_a_pattern_carries_the_name_that_fits(filled: ChunkStore) -> None:
    (row,) = filled.list_chunks("default", name="z*")
    assert (row.name, row.names) == ("zebra", ("guide/1", "zebra"))


def test_pages_follow_each_other(filled: ChunkStore) -> None:
    first = filled.list_chunks("default", limit=2)
    second = filled.list_chunks("default", limit=2, after=first[-1].id)
    third = filled.list_chunks("default", limit=2, after=second[-1].id)
    assert [row.text for row in (*first, *second, *third)] == ["rules", "one", "two", "three", "four"]
    assert filled.list_chunks("default", limit=2, after=third[-1].id) == []
    assert filled.list_chunks("default", limit=0) == []


@pytest.mark.parametrize(
    "metadata",
    [{"tags": ["x"]}, {"a": {"b": 1}}, {1: "x"}, {"n": 2**70}, {"n": float("nan")}, {"s": "\ud800"}],
    ids=ascii,
)
def test_metadata_that_cannot_be_looked_for_is_refused(filled: ChunkStore, metadata: Mapping[Any, Any]) -> None:
    with pytest.raises(InputError, match="must"):
        filled.list_chunks("default", metadata=metadata)


@contextmanager
def plans(store: ChunkStore) -> Iterator[list[str]]:
    """How SQLite answers each query that reads chunks, names or entries meanwhile."""
    found: list[str] = []
    with store._index.read() as db:
        connection = db.conn
    asked: list[str] = []
    connection.set_trace_callback(asked.append)
    yield found
    connection.set_trace_callback(None)
    for query in asked:
        if query.lower().startswith("select") and any(table in query for table in ("chunks", "names", "entries")):
            rows = connection.execute(f"explain query plan {query}").fetchall()
            found.append("; ".join(row[3] for row in rows))


COUNTS: list[dict[str, Any]] = [{}, {"level": 1}, {"metadata": {"source": "a"}}]
FILTERS: list[dict[str, Any]] = [*COUNTS, {"name": "guide*"}, {"name": "g*", "level": 1, "metadata": {"page": 1}}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_every_list_and_count_is_answered_from_indexes(filled: ChunkStore, filters: dict[str, Any]) -> None:
    after = filled.list_chunks("default")[0].id
    with plans(filled) as found:
        filled.list_chunks("default", limit=10, after=after, **filters)
        filled.count_chunks("default", **filters)
    assert len(found) >= 2
    for plan in found:
        tables = [step for step in plan.split("; ") if step.startswith("SCAN")]
        assert all("VIRTUAL TABLE" in step for step in tables), plan  # json_each walks one chunk's metadata
        if "name" in filters and "LIST SUBQUERY" in plan:
            assert "idx_names_namespace_name (namespace=? AND name>? AND name<?)" in plan
            assert "chunks USING INDEX idx_chunks_namespace" not in plan.split("; ")[0], "it walks the namespace"


@pytest.mark.parametrize("filters", COUNTS, ids=str)
def test_counts_read_no_row_of_a_chunk_that_is_not_wanted(filled: ChunkStore, filters: dict[str, Any]) -> None:
    with plans(filled) as found:
        filled.count_chunks("default", **filters)
    assert "COVERING INDEX" in found[0]


def test_statistics_are_answered_from_an_index_alone(filled: ChunkStore, make: Any) -> None:
    rows = filled.list_chunks("default")
    keys = [make.key(row.id, level=row.level) for row in rows]
    filled.publish([(key, make.tensors(), {}) for key in keys])
    with plans(filled) as found:
        stats = filled.stats("default")
    assert [(group.level, group.entries) for group in stats.groups] == [(0, 1), (1, 4)]
    assert all(group.weights == make.model.weights and group.dtype == "bfloat16" for group in stats.groups)
    assert (
        stats.bytes
        == sum(group.bytes for group in stats.groups)
        == 5 * sum(each.nbytes for each in make.tensors().values())
    )
    (plan,) = [plan for plan in found if "entries" in plan]
    assert plan == f"SEARCH entries USING COVERING INDEX {schema.MODELS_INDEX} (namespace=?)"


def test_a_chunk_gets_other_metadata_and_one_more_name(filled: ChunkStore) -> None:
    row = filled.find_chunk("default", "guide/1")
    assert row is not None
    changed = filled.update_chunk("default", row.id, name="first", metadata={"v": 2})
    assert (changed.id, changed.text, changed.metadata) == (row.id, "one", {"v": 2})
    assert (changed.name, changed.names) == ("first", ("guide/1", "zebra", "first"))
    assert filled.update_chunk("default", row.id).metadata == {"v": 2}
    with pytest.raises(NameTakenError):
        filled.update_chunk("default", row.id, name="guide/2", metadata={"v": 3})
    with pytest.raises(InputError, match="characters"):
        filled.update_chunk("default", row.id, name=" ")
    with pytest.raises(UnknownChunkError):
        filled.update_chunk("other", row.id, metadata={})
    found = filled.find_chunk("default", "guide/1")
    assert found is not None
    assert found.metadata == {"v": 2}, "all or nothing"


def test_many_are_deleted_in_one_transaction(filled: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = filled.list_chunks("default", name="guide*")
    filled.publish([(make.key(row.id), make.tensors(), {}) for row in rows])
    kept = filled.list_chunks("other")[0]
    before = filled.stats("default")

    def failing(*_: object) -> None:
        raise StoreError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("braidsdk.store.chunks.delete", failing)
        with pytest.raises(StoreError):
            filled.delete_chunks("default", [row.id for row in rows])
    assert filled.stats("default") == before
    gone = filled.delete_chunks("default", [*(row.id for row in rows), rows[0].id, kept.id, "0" * 32])
    assert (gone.chunks, len(gone.digests), gone.bytes) == (2, 2, before.bytes)
    assert filled.list_chunks("other") == [kept], "another namespace's stays"
    assert not list((filled.path / "entries").rglob("*.safetensors"))


def test_of_many_the_good_are_registered_and_the_bad_named(store: ChunkStore) -> None:
    results = store.add_good_chunks(
        [
            NewChunk("default", 1, "one", "a"),
            NewChunk("default", 1, "two", "a", {"v": 1}),
            NewChunk("default", 1, "three", "b", {"v": object()}),
            NewChunk("default", 1, "four", "b"),
        ]
    )
    assert [type(result).__name__ for result in results] == ["ChunkRow", "NameTakenError", "InputError", "ChunkRow"]
    assert [row.text for row in store.list_chunks("default")] == ["one", "four"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "a object under 'when'"),
        (float("nan"), "NaN or infinity under 'when'"),
        (Path("x"), "Path under 'when'"),
        ({"deep": {1, 2}}, "a dict under 'when'"),
    ],
    ids=["object", "NaN", "path", "set"],
)
def test_metadata_that_is_no_json_is_named_by_its_key(store: ChunkStore, value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        store.add_chunk(namespace="default", level=1, text="one", metadata={"fine": 1, "when": value})


def test_what_is_remembered_outlives_the_process(folder: Path) -> None:
    for _ in range(2):
        with ChunkStore(folder) as store:
            store.remember({"rate": "[1, 2]"}, add={"hits": 3})
            store.remember({})
    with ChunkStore(folder) as store:
        assert store.recall(["rate", "hits", "never"]) == {"rate": "[1, 2]", "hits": "6"}
