"""Chunks outlive the index: their files follow it, and bring everything back."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from braidsdk.errors import StoreCorruptError, StoreError, StoreFullError, UnknownChunkError
from braidsdk.store import ChunkStore, Entry, Hit, NewChunk, Repaired, catalogue, entries, repair, sha256_of_tokens
from braidsdk.store.blobs import DamagedFile
from braidsdk.store.catalogue import Catalogue


def add(store: ChunkStore, text: str, name: str | None = None, namespace: str = "default", **more: Any) -> str:
    return store.add_chunk(namespace=namespace, level=1, text=text, name=name, **more).id


def everything(store: ChunkStore) -> Any:
    """All that a user has told a store about chunks."""
    rows = {each: store.list_chunks(each) for each in store.namespaces()}
    names = {(space, name) for space, some in rows.items() for row in some for name in row.names}
    return rows, {each: store.versions(*each) for each in names}


def lose_index(folder: Path) -> None:
    for path in folder.glob("index.db*"):
        path.unlink()


@pytest.fixture
def told(store: ChunkStore) -> ChunkStore:
    """A store with all that can be told about chunks."""
    store.add_chunks(
        [NewChunk("default", 1, f"text {n}", f"name {n}", {"n": n, "deep": [{"é": None}]}) for n in range(5)]
    )
    store.add_chunk(namespace="other", level=0, text="text 1", name="name 1")
    moved = [add(store, f"edition {n}", "guide", replace=True) for n in range(3)]
    add(store, "edition 0", "guide", replace=True)  # back to the first
    store.update_chunk("default", moved[1], name="second name", metadata={"é": "\N{SNOWMAN}"}, pinned=True)
    store.delete_chunk("default", add(store, "what is deleted", "gone"))
    return store


def test_a_lost_index_loses_nothing(told: ChunkStore, folder: Path) -> None:
    before = everything(told)
    assert len(before[1]["default", "guide"]) == 4
    told.close()
    lose_index(folder)
    with ChunkStore(folder) as store:
        assert everything(store) == before
        assert store.rebuilt is not None
        assert (store.rebuilt.chunks, store.rebuilt.damaged, store.rebuilt.without_names) == (9, (), ())
        assert store.check().is_sound
        later = add(store, "later")
        assert store.list_chunks("default")[-1].id == later, "the order of registration goes on"
    with ChunkStore(folder) as store:
        assert store.rebuilt is None


def test_a_repair_leaves_a_sound_store_as_it_is(told: ChunkStore, folder: Path) -> None:
    before = everything(told)
    done = repair(folder, 1.0)
    assert done == Repaired(None, (), (), (), ())
    assert everything(told) == before


def test_a_repair_rebuilds_a_damaged_index(told: ChunkStore, folder: Path) -> None:
    before = everything(told)
    told.close()
    content = bytearray((folder / "index.db").read_bytes())
    content[100:] = os.urandom(len(content) - 100)
    (folder / "index.db").write_bytes(content)
    with pytest.raises(StoreCorruptError, match="braid store repair"):
        ChunkStore(folder)
    done = repair(folder)
    assert done.rebuilt is not None
    assert (folder / "damaged" / str(done.old_index)).read_bytes() == bytes(content)
    with ChunkStore(folder) as store:
        assert everything(store) == before
        store.delete_chunk("default", store.list_chunks("default")[0].id)
    assert not list((folder / "damaged").iterdir()), "a deletion removes texts of that time"


def test_a_repair_rebuilds_an_index_whose_texts_are_wrong(told: ChunkStore, folder: Path) -> None:
    before = everything(told)
    with told._index.write() as db:
        db.execute("update chunks set text = 'another' where number = 2")
    assert repair(folder).old_index
    with ChunkStore(folder) as store:
        assert everything(store) == before


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "swap", "folder"])
def test_files_of_chunks_that_are_damaged_are_named_and_written_again(
    told: ChunkStore, folder: Path, harm: str
) -> None:
    before = everything(told)
    first, second = (told._layout.chunk(row.id) for row in told.list_chunks("default")[:2])
    match harm:
        case "flip":
            first.write_bytes(first.read_bytes().replace(b"text", b"Text"))
        case "cut":
            first.write_bytes(first.read_bytes()[:-5])
        case "swap":
            first.write_bytes(second.read_bytes())
        case _:
            first.unlink()
    if harm == "folder":
        first.mkdir()
    found = told.check()
    assert [each for each, _ in found.behind] == [first.stem]
    assert not found.is_sound
    if harm == "folder":
        first.rmdir()  # nothing is removed that is not ours
    assert [each for each, _ in repair(folder).written] == [first.stem]
    assert told.check().is_sound
    told.close()
    lose_index(folder)
    with ChunkStore(folder) as store:
        assert everything(store) == before


def test_a_damaged_file_and_no_index_leave_the_text_that_an_entry_has(
    store: ChunkStore, folder: Path, make: Any
) -> None:
    ids = [add(store, f"text {n}", f"name {n}") for n in range(3)]
    store.publish([(make.key(ids[0]), make.tensors(), {})])
    for each in ids[:2]:
        path = store._layout.chunk(each)
        path.write_bytes(path.read_bytes()[:-1])
    store.close()
    lose_index(folder)
    with ChunkStore(folder) as again:
        assert [(row.text, row.names) for row in again.list_chunks("default")] == [
            ("text 2", ("name 2",)),
            ("text 0", ()),
        ]
        assert again.rebuilt is not None
        assert again.rebuilt.without_names == (ids[0],)
        assert len(again.rebuilt.damaged) == again.damaged_count == 2
        assert isinstance(again.load([make.key(ids[0])])[0], Entry)
        assert again.check().is_sound


def test_an_entry_that_outlives_its_deletion_brings_nothing_back(store: ChunkStore, folder: Path, make: Any) -> None:
    rules, text = add(store, "rules"), add(store, "text")
    keys = [make.key(text), make.key(rules, after=(text,), after_sha256=sha256_of_tokens((1,)))]
    store.publish([(key, make.tensors(n), {}) for n, key in enumerate(keys)])
    hits = [hit for hit in store.look_up(keys) if isinstance(hit, Hit)]
    kept = [hit.path.read_bytes() for hit in hits]
    store.delete_chunk("default", text)
    for hit, content in zip(hits, kept, strict=True):
        hit.path.write_bytes(content)
    store.close()
    lose_index(folder)
    with ChunkStore(folder) as again:
        assert [row.text for row in again.list_chunks("default")] == ["rules"]
        assert again.look_up(keys) == [None, None]
        assert {hit.path.exists() for hit in hits} == {False}, "the sweep removes them"


def test_without_any_file_of_a_chunk_the_entries_texts_are_taken_and_written(
    store: ChunkStore, folder: Path, make: Any
) -> None:
    ident = add(store, "text", "name")
    store.publish([(make.key(ident), make.tensors(), {})])
    store.close()
    lose_index(folder)
    for path in [*folder.glob("chunks/*/*"), *folder.glob("chunks/*"), folder / "chunks"]:
        path.unlink() if path.is_file() else path.rmdir()
    with ChunkStore(folder) as again:
        assert [row.text for row in again.list_chunks("default")] == ["text"]
        assert again.check().is_sound
    assert [path.stem for path in folder.glob("chunks/*/*")] == [ident]


def test_files_that_a_process_left_behind_are_written_at_the_next_opening(
    told: ChunkStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "publish", lambda _: None)  # as if it was killed then
        new = add(told, "new", "guide", replace=True)
        gone = told.list_chunks("default")[0].id
        told.delete_chunk("default", gone)
        before = everything(told)
    assert told._layout.chunk(gone).exists()
    assert not told._layout.chunk(new).exists()
    with ChunkStore(folder) as store:
        assert not told._layout.chunk(gone).exists()
        assert store.check().is_sound
        with store._index.read() as db:
            assert db.table("stale").count == 0
    told.close()
    lose_index(folder)
    with ChunkStore(folder) as store:
        assert everything(store) == before


def test_a_name_that_was_half_moved_is_the_later_ones(
    store: ChunkStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add(store, "first", "guide")
    old = store._layout.chunk(first).read_bytes()
    second = add(store, "second", "guide", replace=True)
    before = [(each.chunk_id, each.since, each.until) for each in store.versions("default", "guide")]
    store._layout.chunk(first).write_bytes(old)  # as if the process was killed before it moved this one
    store.close()
    lose_index(folder)
    with ChunkStore(folder) as again:
        assert [(each.chunk_id, each.since, each.until) for each in again.versions("default", "guide")] == before
        assert before[0][0] == second
        assert again.check().is_sound, "the file of the first was written again"


def test_a_full_disk_registers_nothing(store: ChunkStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "write", full)
        with pytest.raises(StoreFullError):
            add(store, "text")
    assert store.list_chunks("default") == []
    assert not list((folder / "tmp").glob("*.part"))
    add(store, "text")
    assert store.check().is_sound


def test_a_deleted_file_that_stays_is_told(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ident = add(store, "text")

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("braidsdk.store.files.remove", fail)
        with pytest.raises(StoreError, match="text may still be there"):
            store.delete_chunk("default", ident)
    assert store.list_chunks("default") == []
    assert [each for each, _ in store.check().behind] == [], "it is known to be stale"
    add(store, "another")  # the next change removes it too
    assert not store._layout.chunk(ident).exists()


def test_many_threads_and_stores_leave_files_that_say_what_the_index_says(folder: Path) -> None:
    ChunkStore(folder).close()

    def work(number: int) -> None:
        with ChunkStore(folder) as store:
            for n in range(12):
                add(store, f"text {n % 3}", f"name {n % 2}", replace=True, metadata={"by": number})
                if n % 4 == 3:
                    store.delete_chunk("default", add(store, f"text {n % 3}"))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    with ChunkStore(folder) as store:
        before = everything(store)
        assert store.check().is_sound
    lose_index(folder)
    with ChunkStore(folder) as store:
        assert everything(store) == before


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": {"text": "other"}},
        {"chunk": {"level": True}},
        {"chunk": {"metadata": "[" * 1000 + "]" * 1000}},
        {"chunk": {"metadata": '{"n": NaN}'}},
        {"chunk": {"number": 2**70}},
        {"chunk": {"number": -1}},
        {"chunk": {"created": "yesterday"}},
        {"chunk": {"created": "\ud800"}},
        {"chunk": {"level": 3}},
        {"names": [{"name": "\ud800", "number": 1, "since": "2026-01-01"}]},
        {"names": [{"name": " ", "number": 1, "since": "2026-01-01"}]},
        {"names": [{"name": "x", "number": 1, "since": "yesterday"}]},
        {"chunk": {"more": 1}},
        {"names": [{"name": 1, "number": 1, "since": ""}]},
        {"names": {}},
        {"former": [{"name": "x", "number": 1, "since": ""}]},
        {"extra": []},
    ],
)
def test_a_forged_file_is_damage(store: ChunkStore, change: dict[str, Any]) -> None:
    path = store._layout.chunk(add(store, "text", "name"))
    record = vars(catalogue.read(path))
    forged = {**record, **change}
    if "chunk" in change:
        forged["chunk"] = {**record["chunk"], **change["chunk"]}
    rest = b'","chunk":' + json.dumps(forged).encode() + b"}\n"
    digest = catalogue.xxhash.xxh3_128_hexdigest(rest).encode()
    path.write_bytes(b'{"digest":"' + digest + rest)
    with pytest.raises(DamagedFile):
        catalogue.read(path)


def test_the_names_before_are_bounded_and_restored(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braidsdk.store.chunks.FORMER_NAMES", 3)
    ids = [add(store, f"edition {n}", "guide", replace=True) for n in range(6)]
    assert [each.chunk_id for each in store.versions("default", "guide")] == ids[:1:-1]
    assert store.check().is_sound
    assert store.restore_name("default", "guide").id == ids[4]
    assert store.restore_name("default", "guide", ids[3]).id == ids[3]
    with pytest.raises(UnknownChunkError, match="must have stood for chunk"):
        store.restore_name("default", "guide", ids[0])
    with pytest.raises(UnknownChunkError, match="no other is known"):
        store.restore_name("default", "unknown")
    assert store.versions("other", "guide") == []
    store.delete_chunk("default", ids[4])
    assert ids[4] not in {each.chunk_id for each in store.versions("default", "guide")}


def test_a_repair_takes_in_what_the_index_lost_and_not_what_was_deleted(
    store: ChunkStore, folder: Path, make: Any
) -> None:
    kept, gone = make.key(add(store, "kept")), make.key(add(store, "gone"))
    store.publish([(kept, make.tensors(1), {}), (gone, make.tensors(2), {})])
    content = store._layout.entry(gone.digest).read_bytes()
    chunk, text = store._layout.chunk(str(gone.chunk_id)), store._layout.chunk(str(gone.chunk_id)).read_bytes()
    store.delete_chunk("default", str(gone.chunk_id))
    with store._index.write() as db:
        entries.delete(db, [kept.digest])
    store.close()
    store._layout.entry(gone.digest).write_bytes(content)
    chunk.write_bytes(text)
    done = repair(folder)
    assert (done.taken_in, done.removed) == ((kept.digest,), (gone.digest,))
    assert [each for each, _ in done.written] == [gone.chunk_id]
    with ChunkStore(folder) as again:
        (found,) = again.load([kept])
        assert found is not None
        assert make.content(found.tensors) == make.content(make.tensors(1))
        assert [row.text for row in again.list_chunks("default")] == ["kept"]
    assert not chunk.exists()
    assert [path.name[:32] for path in (folder / "damaged").iterdir()] == [gone.chunk_id], "a text is not thrown away"


class KilledError(BaseException):
    """Stands for a process that ends at once."""


def test_a_rebuild_that_is_killed_loses_nothing(
    store: ChunkStore, folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make.key(add(store, "text"))
    store.publish([(key, make.tensors(), {})])
    path = store._layout.chunk(str(key.chunk_id))
    path.write_bytes(path.read_bytes()[:-1])
    store.close()
    lose_index(folder)

    def kill(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(entries, "record_damage", kill)
        with pytest.raises(KilledError):
            ChunkStore(folder)
    with ChunkStore(folder) as again:
        assert [row.text for row in again.list_chunks("default")] == ["text"]
        assert isinstance(again.load([key])[0], Entry)
        assert again.check().is_sound
        assert len(list((folder / "damaged").iterdir())) == 1


def test_text_in_damaged_files_of_unknown_chunks_goes_with_a_deletion(
    store: ChunkStore, folder: Path, make: Any
) -> None:
    key = make.key(add(store, "a secret"))
    store.publish([(key, make.tensors(), {})])
    (path,) = folder.glob("entries/*/*")
    path.write_bytes(path.read_bytes().replace(b"bfloat16", b"bfloat17", 1))
    store.close()
    lose_index(folder)
    with ChunkStore(folder) as again:
        assert again.damaged_count == 1
        again.delete_chunk("default", str(key.chunk_id))
    assert not [each for each in folder.rglob("*") if each.is_file() and b"a secret" in each.read_bytes()]


def test_entries_of_a_deleted_chunk_go_even_if_its_own_file_stays(
    store: ChunkStore, folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make.key(add(store, "text"))
    store.publish([(key, make.tensors(), {})])

    def fail(_: Any) -> None:
        raise StoreError("The disk fails.")

    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "publish", fail)
        with pytest.raises(StoreError, match="braid gc"):
            store.delete_chunk("default", str(key.chunk_id))
    assert not list(folder.glob("entries/*/*"))


def test_failed_openings_leave_nothing_open(folder: Path) -> None:
    ChunkStore(folder).close()
    (folder / "index.db").write_bytes(b"junk" * 5000)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(StoreCorruptError):
            ChunkStore(folder)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not list((folder / "tmp").iterdir())


def test_files_of_another_process_are_not_written_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChunkStore(folder) as one, ChunkStore(folder) as other:
        one.add_chunks([NewChunk("default", 1, f"text {n}") for n in range(catalogue.SETTLE - 1)])
        written: list[Path] = []
        write = catalogue.write
        monkeypatch.setattr(catalogue, "write", lambda path, *rest: (written.append(path), write(path, *rest)))
        add(other, "another")
        assert len(written) == 1
        one.add_chunks([NewChunk("default", 1, f"more {n}") for n in range(catalogue.SETTLE)])
        with one._index.read() as db:
            assert catalogue.stale(db) == {}, "many marks are removed at once"


def test_a_restore_without_an_id_goes_to_another_chunk(store: ChunkStore) -> None:
    first = add(store, "first", "guide")
    second = add(store, "second", "guide", replace=True)
    third = add(store, "third", "guide", replace=True)
    store.delete_chunk("default", third)
    add(store, "second", "guide", replace=True)
    assert store.restore_name("default", "guide").id == first
    assert second in {each.chunk_id for each in store.versions("default", "guide")}
