"""Registered chunks: the same text, names, metadata, and finding them again."""

import threading
from pathlib import Path
from typing import Any

import pytest

from braidsdk.errors import (
    ClosedError,
    EmptyTextError,
    HashCollisionError,
    InputError,
    NameTakenError,
    StoreCorruptError,
)
from braidsdk.store import ChunkRow, ChunkStore, NewChunk, chunk_id, chunks


def add(store: ChunkStore, text: str, name: str | None = None, **more: Any) -> ChunkRow:
    return store.add_chunk(**({"namespace": "default", "level": 1, "text": text, "name": name} | more))


def test_a_chunk_has_the_id_of_its_content(store: ChunkStore) -> None:
    row = add(store, "one\n", "first", metadata={"source": "a.txt", "pages": [1, 2]})
    assert row == ChunkRow(
        id=chunk_id("default", 1, "one\n"),
        namespace="default",
        level=1,
        text="one\n",
        name="first",
        names=("first",),
        metadata={"source": "a.txt", "pages": [1, 2]},
    )


def test_the_same_text_again_is_the_same_chunk(store: ChunkStore) -> None:
    assert add(store, "one\n") == add(store, "one\n")
    assert len(store.list_chunks("default")) == 1


def test_metadata_changes_only_when_it_is_given(store: ChunkStore) -> None:
    add(store, "one\n", metadata={"v": 1})
    assert add(store, "one\n").metadata == {"v": 1}
    assert add(store, "one\n", metadata={"v": 2}).metadata == {"v": 2}
    assert add(store, "one\n", metadata={}).metadata == {}


def test_a_second_name_for_a_text_is_an_alias(store: ChunkStore) -> None:
    add(store, "one\n", "first")
    row = add(store, "one\n", "second")
    assert (row.name, row.names) == ("second", ("first", "second"))
    assert [found.name for found in store.list_chunks("default")] == ["first"]


def test_a_name_for_the_same_text_is_idempotent(store: ChunkStore) -> None:
    assert add(store, "one\n", "first") == add(store, "one\n", "first")


def test_a_name_of_another_text_is_refused_and_nothing_is_registered(store: ChunkStore) -> None:
    add(store, "one\n", "first")
    with pytest.raises(NameTakenError, match="replace=True"):
        add(store, "two\n", "first")
    assert [row.text for row in store.list_chunks("default")] == ["one\n"]


def test_replace_moves_the_name_and_leaves_the_old_chunk(store: ChunkStore) -> None:
    old = add(store, "one\n", "first")
    new = add(store, "two\n", "first", replace=True)
    found = store.find_chunk("default", "first")
    assert found is not None
    assert found.id == new.id
    left = store.find_chunk("default", old.id)
    assert left is not None
    assert (left.text, left.name, left.names) == ("one\n", None, ())


def test_a_name_may_stand_for_other_texts_in_other_namespaces(store: ChunkStore) -> None:
    one, two = add(store, "one\n", "x"), add(store, "two\n", "x", namespace="other")
    for namespace, row in (("default", one), ("other", two)):
        assert store.find_chunk(namespace, "x") == row
        assert store.list_chunks(namespace) == [row]
    assert store.find_chunk("other", one.id) is None
    assert store.find_chunks("other", [one.id, two.id]) == {two.id: two}


def test_the_same_text_at_another_level_is_another_chunk(store: ChunkStore) -> None:
    assert add(store, "one\n", level=0).id != add(store, "one\n", level=1).id


def test_a_chunk_found_by_a_name_carries_that_name(store: ChunkStore) -> None:
    row = add(store, "one\n", "first")
    add(store, "one\n", "second")
    names = {asked: store.find_chunk("default", asked) for asked in ("first", "second", row.id)}
    assert {asked: found.name if found else None for asked, found in names.items()} == {
        "first": "first",
        "second": "second",
        row.id: "first",
    }


def test_an_unknown_name_finds_nothing(store: ChunkStore) -> None:
    assert store.find_chunk("default", "nobody") is None
    assert store.find_chunks("default", ["0" * 32]) == {}
    assert store.list_chunks("nowhere") == []


def test_chunks_are_listed_in_the_order_of_registration(store: ChunkStore) -> None:
    texts = [f"{word}\n" for word in ["zebra", "apple", "mango"]]
    store.add_chunks([NewChunk("default", 1, text) for text in texts])
    add(store, texts[0])
    assert [row.text for row in store.list_chunks("default")] == texts


def test_many_chunks_are_registered_all_or_none(store: ChunkStore) -> None:
    add(store, "one\n", "taken")
    with pytest.raises(NameTakenError):
        store.add_chunks([NewChunk("default", 1, "two\n"), NewChunk("default", 1, "three\n", "taken")])
    assert [row.text for row in store.list_chunks("default")] == ["one\n"]


def test_more_ids_than_a_query_has_parameters_are_found(store: ChunkStore) -> None:
    rows = store.add_chunks([NewChunk("default", 1, f"{i}\n", f"name {i}") for i in range(2000)])
    assert store.find_chunks("default", [row.id for row in rows]) == {row.id: row for row in rows}
    assert store.list_chunks("default") == rows


@pytest.mark.parametrize("name", ["", "  ", "c0ffee" * 5 + "12", "C0FFEE" * 5 + "12", "x" * 501, "a\ud800"])
def test_a_name_that_cannot_be_used_is_refused(store: ChunkStore, name: str) -> None:
    with pytest.raises(InputError):
        add(store, "one\n", name)
    assert store.list_chunks("default") == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"text": ""}, EmptyTextError),
        ({"text": "a\ud800"}, InputError),
        ({"namespace": ""}, InputError),
        ({"namespace": "\ud800"}, InputError),
        ({"level": -1}, InputError),
        ({"level": 3}, InputError),
        ({"metadata": {"x": object()}}, InputError),
        ({"metadata": {"x": float("nan")}}, InputError),
    ],
)
def test_what_cannot_be_registered_is_refused(store: ChunkStore, change: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        add(store, **({"text": "one\n"} | change))
    assert store.list_chunks("default") == []


@pytest.mark.parametrize("text", ["a\0b\n", "'; drop table chunks; --\n", "\N{SNOWMAN}" * 3 + "\n", "?\n", "x" * 10**6])
def test_any_text_comes_back_as_it_was(store: ChunkStore, text: str) -> None:
    row = add(store, text, name=text[:20], metadata={"text": text})
    found = store.find_chunk("default", text[:20])
    assert found == row
    assert found.text == found.metadata["text"] == text


def test_two_texts_with_one_id_are_an_error(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braidsdk.store.chunks.chunk_id", lambda *_: "c" * 32)
    add(store, "one\n")
    with pytest.raises(HashCollisionError, match="another text"):
        add(store, "two\n")
    assert [row.text for row in store.list_chunks("default")] == ["one\n"]


def test_a_text_that_changed_in_the_index_is_noticed(store: ChunkStore) -> None:
    row = add(store, "one\n")
    with store._index.write() as db:
        db.execute("update chunks set text = 'two'")
    with pytest.raises(StoreCorruptError, match="braid store repair"):
        store.find_chunk("default", row.id)


def test_close_names_are_suggested_and_bounded(store: ChunkStore) -> None:
    store.add_chunks([NewChunk("default", 1, f"{i}\n", f"chapter-{i}") for i in range(50)])
    add(store, "other\n", "capital")
    assert store.close_names("default", "capitol") == ["capital"]
    assert len(store.close_names("default", "chapter-1x")) == 3
    assert store.close_names("default", "zzz") == []
    assert store.close_names("other", "capital") == []


def test_chunks_are_there_after_the_store_is_opened_again(folder: Path) -> None:
    with ChunkStore(folder) as store:
        row = add(store, "one\n", "first", metadata={"v": 1})
    with ChunkStore(str(folder)) as store:
        assert store.find_chunk("default", "first") == row


def test_a_closed_store_says_so(folder: Path) -> None:
    store = ChunkStore(folder)
    store.close()
    store.close()
    with pytest.raises(ClosedError):
        store.list_chunks("default")


def test_several_threads_share_a_store(store: ChunkStore) -> None:
    failures: list[BaseException] = []

    def register(worker: int) -> None:
        try:
            for i in range(20):
                add(store, f"text {i % 10}\n", f"name {worker} {i}")
                assert store.find_chunk("default", f"name {worker} {i}") is not None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=register, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store.list_chunks("default")) == 10
    assert sum(len(row.names) for row in store.list_chunks("default")) == 80


def nested(levels: int) -> dict[str, Any]:
    value: Any = 1
    for level in range(levels - 1):
        value = [value] if level % 2 else {"x": value}
    return {"top": value}


def test_metadata_has_as_many_levels_as_can_be_read_back_everywhere(store: ChunkStore) -> None:
    row = store.add_chunk(namespace="default", level=1, text="one", metadata=nested(chunks.METADATA_DEPTH))
    assert store.find_named("default", [row.id])[row.id].metadata == nested(chunks.METADATA_DEPTH)
    for levels in (chunks.METADATA_DEPTH + 1, 950, 200_000):
        with pytest.raises(InputError, match="at most 64 levels"):
            store.add_chunk(namespace="default", level=1, text="two", metadata=nested(levels))
        with pytest.raises(InputError, match="at most 64 levels"):
            store.update_chunk("default", row.id, metadata=nested(levels))


@pytest.mark.parametrize(
    "content", ['{"x":' * 950 + "1" + "}" * 950, "[" * 200_000, "[]", "7", "", "{'x': 1}", '{"x":NaN', "7" * 5000]
)
def test_metadata_that_someone_else_wrote_is_named_and_not_followed(store: ChunkStore, content: str) -> None:
    row = store.add_chunk(namespace="default", level=1, text="one", metadata={"v": 1})
    with store._index.write() as db:
        db.execute("update chunks set metadata = ?", [content])
    with pytest.raises(StoreCorruptError, match=f"metadata of chunk {row.id}"):
        store.list_chunks("default")
