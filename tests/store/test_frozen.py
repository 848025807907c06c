"""Stores that earlier versions wrote are opened, or refused by name. Each is a tar file in `tests/data/`.

`freeze` made that of format 2. A frozen store is never made again: a change that needs that is a new format.
"""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from braidsdk.errors import StoreVersionError
from braidsdk.store import FORMAT_VERSION, ChunkStore, Entry, EntryKey, schema

DATA = Path(__file__).parent.parent / "data"


def freeze(folder: Path, make: Any) -> None:
    """Write a store that holds something of everything, and pack it."""
    with ChunkStore(folder / "store") as store:
        for key, tensors in content(store, make):
            store.publish([(key, tensors, {"torch": "2.11"})])
    with tarfile.open(folder / f"store-format-{FORMAT_VERSION}.tar.xz", "w:xz") as tar:
        for path in sorted((folder / "store").rglob("*")):
            if path.name != "reserve":
                tar.add(path, path.relative_to(folder), recursive=False)


def content(store: ChunkStore, make: Any) -> list[tuple[EntryKey, Any]]:
    rules = store.add_chunk(namespace="default", level=0, text="rules", name="rules", metadata={"é": [1, None]}).id
    store.add_chunk(namespace="default", level=1, text="first edition", name="guide")
    second = store.add_chunk(namespace="default", level=1, text="second edition", name="guide", replace=True).id
    store.update_chunk("default", second, pinned=True)
    return keys(make, rules, second)


def keys(make: Any, rules: str, second: str) -> list[tuple[EntryKey, Any]]:
    after = {"after": (rules,), "after_sha256": "ab" * 32}
    return [(make.key(None, level=0), make.tensors(0)), (make.key(second, **after), make.tensors(1, "float32"))]


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    with tarfile.open(DATA / "store-format-2.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "store"


@pytest.mark.parametrize("index", ["there", "lost"])
def test_a_store_of_format_2_is_opened(frozen: Path, make: Any, index: str) -> None:
    if index == "lost":
        (frozen / "index.db").unlink()
    with ChunkStore(frozen) as store:
        rows = store.list_chunks("default")
        assert [(row.text, row.names, row.metadata, row.pinned) for row in rows] == [
            ("rules", ("rules",), {"é": [1, None]}, False),
            ("first edition", (), {}, False),
            ("second edition", ("guide",), {}, True),
        ]
        assert [each.chunk_id for each in store.versions("default", "guide")] == [rows[2].id, rows[1].id]
        for key, tensors in keys(make, rows[0].id, rows[2].id):
            (entry,) = store.load([key])
            assert isinstance(entry, Entry)
            assert make.content(entry.tensors) == make.content(tensors)
            assert entry.provenance == {"torch": "2.11"}
        assert store.check(1.0).is_sound


def test_a_store_of_a_later_version_is_refused_and_stays_as_it_is(
    frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in frozen.rglob("*") if path.is_file()}
    monkeypatch.setattr(schema, "_known", frozenset)
    with pytest.raises(StoreVersionError, match="m001_tables"):
        ChunkStore(frozen)
    after = {path: path.read_bytes() for path in frozen.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
