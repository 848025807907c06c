"""Stores on network file systems, and an index elsewhere."""

import os
from pathlib import Path
from typing import Any

import pytest

from braidsdk.errors import StorePathError
from braidsdk.store import ChunkStore, Entry, places, repair


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on what this process takes for NFS."""
    folder = tmp_path / "a share"
    folder.mkdir()
    mounts = tmp_path / "mountinfo"
    point = str(folder).replace(" ", "\\040")
    mounts.write_text(
        "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        f"90 21 0:50 / {point} rw,relatime shared:40 - nfs4 server:/export rw,vers=4.2\n"
        f"91 90 0:51 / {point}/local rw - ext4 /dev/vdb rw\n"
    )
    monkeypatch.setattr(places, "MOUNTS", mounts)
    return folder


def test_network_file_systems_are_told_apart(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert places.network_file_system(shared / "not" / "there") == "nfs4"
    assert places.network_file_system(shared) == "nfs4"
    (shared / "local").mkdir()
    assert places.network_file_system(shared / "local" / "x") is None
    assert places.network_file_system(tmp_path) is None
    (tmp_path / "link").symlink_to(shared)
    assert places.network_file_system(tmp_path / "link" / "x") == "nfs4"
    monkeypatch.setattr(places, "MOUNTS", tmp_path / "none")
    assert places.network_file_system(shared) is None


def test_a_store_on_a_share_is_refused_by_name(shared: Path) -> None:
    with pytest.raises(StorePathError, match=r"is on nfs4\. .*BRAID_INDEX"):
        ChunkStore(shared / "store")
    with pytest.raises(StorePathError, match="is on nfs4"):
        ChunkStore(shared / "store", index=shared / "index")
    assert list(shared.iterdir()) == []


def test_its_index_may_be_elsewhere(shared: Path, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChunkStore(shared / "store", index=tmp_path / "indexes") as store:
        key = make.key(store.add_chunk(namespace="default", level=1, text="text", name="name").id)
        store.publish([(key, make.tensors(), {})])
        assert list(store._layout.home.glob("tmp/*.lock"))
    (home,) = (tmp_path / "indexes").iterdir()
    assert home.name.startswith("store-")
    assert sorted(path.name for path in (shared / "store").iterdir()) == [
        "chunks",
        "damaged",
        "entries",
        "index.json",
        "tmp",
    ]
    with ChunkStore(shared / "store", index=tmp_path / "indexes") as store:
        assert isinstance(store.load([key])[0], Entry)
        assert store.check(1.0).is_sound
    (home / "index.db").write_bytes(b"junk" * 3000)
    done = repair(shared / "store", index=tmp_path / "indexes")
    assert done.old_index is not None
    assert (shared / "store" / "damaged" / done.old_index).exists()
    with ChunkStore(shared / "store", index=tmp_path / "indexes") as store:
        assert isinstance(store.load([key])[0], Entry)
        assert store.find_chunk("default", "name") is not None
        store.delete_chunk("default", str(key.chunk_id))
    assert not list((shared / "store" / "damaged").iterdir())


def test_another_machine_or_folder_does_not_make_another_index(
    shared: Path, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChunkStore(shared / "store", index=tmp_path / "one") as store:
        store.publish([(make.key(None), make.tensors(), {})])
    with pytest.raises(StorePathError, match="must be opened where it is"):
        ChunkStore(shared / "store", index=tmp_path / "two")
    with pytest.raises(StorePathError, match="must be opened where it is"):
        ChunkStore(shared / "store")
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "another")
        with pytest.raises(StorePathError, match="on another"):
            ChunkStore(shared / "store", index=tmp_path / "one")
    assert len(list(shared.glob("store/entries/*/*"))) == 1, "they are no strays"
    (shared / "store" / "index.json").write_text("{}")
    with pytest.raises(StorePathError):
        ChunkStore(shared / "store", index=tmp_path / "one")
    (shared / "store" / "index.json").unlink()
    with ChunkStore(shared / "store", index=tmp_path / "two") as store:
        assert isinstance(store.load([make.key(None)])[0], Entry), "it was rebuilt"


def test_a_store_with_its_index_inside_is_not_split(folder: Path, tmp_path: Path) -> None:
    with ChunkStore(folder) as store:
        store.add_chunk(namespace="default", level=1, text="text")
    with pytest.raises(StorePathError, match="where it was made"):
        ChunkStore(folder, index=tmp_path / "indexes")
    (folder / "index.db").rename(tmp_path / "old")
    with ChunkStore(folder, index=tmp_path / "indexes") as store:
        assert [row.text for row in store.list_chunks("default")] == ["text"]


def test_a_share_that_can_only_be_read_is_read(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(places, "MOUNTS", shared / "none")
        with ChunkStore(shared / "store") as store:
            store.add_chunk(namespace="default", level=1, text="text")
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)
    with ChunkStore(shared / "store") as store:
        assert len(store.list_chunks("default")) == 1
