"""What a check of everything finds, and that it changes nothing."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from braidsdk.store import ChunkStore, EntryKey, Hit, NewChunk, entries, repair
from braidsdk.store import check as check_module


@pytest.fixture
def keys(store: ChunkStore, make: Any) -> list[EntryKey]:
    rows = store.add_chunks([NewChunk("default", 1, f"text {n}") for n in range(4)])
    found = [make.key(row.id) for row in rows]
    store.publish([(key, make.tensors(n), {}) for n, key in enumerate(found)])
    return found


def path_of(store: ChunkStore, key: EntryKey) -> Path:
    (hit,) = store.look_up([key])
    assert isinstance(hit, Hit)
    return hit.path


def test_a_sound_store_is_sound(store: ChunkStore, keys: list[EntryKey]) -> None:
    steps: list[tuple[int, int]] = []
    for share, read in ((0.0, 0), (1.0, len(keys))):
        found = store.check(share, lambda *step: steps.append(step))
        assert found.is_sound
        assert (found.entries, found.read, found.damaged, found.stray, found.index) == (len(keys), read, (), (), ())
    assert steps == [(n, 4) for n in (1, 2, 3, 4)] * 2


def flip(at: int) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return harm


@pytest.mark.parametrize(
    ("harm", "why", "share"),
    [
        (Path.unlink, "missing", 0.0),
        (flip(100), "header", 0.0),
        (flip(-1), "content", 1.0),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "must have", 0.0),
        (lambda path: (path.unlink(), path.mkdir()), "regular file", 0.0),
    ],
)
def test_a_damaged_entry_is_named_and_stays(
    store: ChunkStore, folder: Path, keys: list[EntryKey], harm: Callable[[Path], object], why: str, share: float
) -> None:
    harm(path_of(store, keys[1]))
    found = store.check(share)
    assert not found.is_sound
    ((digest, said),) = found.damaged
    assert digest == keys[1].digest
    assert why in said
    assert (store.stats("default").entries, store.damaged_count) == (len(keys), 0)
    assert list((folder / "damaged").iterdir()) == []
    if share:
        assert store.check().is_sound, "headers alone do not show it"


def test_another_sound_file_in_the_place_of_an_entry_is_named(store: ChunkStore, keys: list[EntryKey]) -> None:
    path_of(store, keys[0]).write_bytes(path_of(store, keys[1]).read_bytes())
    assert store.check().damaged == ((keys[0].digest, "it is not the file that the index names"),)


def test_strays_and_texts_that_are_not_their_ids_are_named(store: ChunkStore, keys: list[EntryKey]) -> None:
    with store._index.write() as db:
        entries.delete(db, [keys[2].digest])
        db.execute("update chunks set text = 'another' where number = 1")
    found = store.check()
    assert found.stray == (keys[2].digest,)
    assert found.damaged == ()
    assert "must be the hash of its text" in found.index[0]
    assert not found.is_sound


def test_a_damaged_index_is_named(store: ChunkStore, folder: Path) -> None:
    store.add_chunks([NewChunk("default", 1, f"text {n} " * 50, f"name {n}") for n in range(200)])
    with closing(sqlite3.connect(folder / "index.db")) as db:
        (root,) = db.execute("select rootpage from sqlite_schema where name = 'idx_names_namespace_name'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    content = bytearray((folder / "index.db").read_bytes())
    content[(root - 1) * size + 8 : (root - 1) * size + 12] = b"\xff\xff\xff\xff"
    (folder / "index.db").write_bytes(content)
    with ChunkStore(folder) as opened:
        assert opened.check().index


def test_a_row_that_does_not_say_what_its_file_says_is_a_trouble_of_the_index(
    store: ChunkStore, keys: list[EntryKey], folder: Path
) -> None:
    """Found by one flipped bit of the index, where SQLite finds nothing."""
    with store._index.write() as db:
        db.execute(
            "update entries set record = replace(record, 'e3b0c442', 'e3b0c443') where digest = ?", [keys[0].digest]
        )
    assert store.load([keys[0]]) == [None]
    assert "does not say what its file says" in store.check().index[0]
    assert repair(folder).old_index
    with ChunkStore(folder) as again:
        assert all(again.load(keys))


def test_an_entry_that_is_computed_again_meanwhile_is_not_damaged(
    store: ChunkStore, keys: list[EntryKey], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = check_module._entry

    def entry(*given: Any, **options: Any) -> Any:
        found = looked(*given, **options)
        if given[1] == keys[0].digest:
            path_of(store, keys[0]).unlink()
            store.load([keys[0]])  # sets it aside
            store.publish([(keys[0], make.tensors(7), {"other": "provenance"})])
        return found

    path_of(store, keys[0]).write_bytes(b"damaged")
    monkeypatch.setattr(check_module, "_entry", entry)
    assert store.check().damaged == ()


def test_text_that_is_not_utf8_is_a_trouble_of_the_index_in_any_column(
    store: ChunkStore, keys: list[EntryKey], folder: Path
) -> None:
    with store._index.write() as db:
        db.execute("update entries set file = cast(x'ff' as text)")
    assert store.check().index == ("entries has text that is not UTF-8",)
    assert repair(folder).old_index
    with ChunkStore(folder) as again:
        assert all(again.load(keys))
