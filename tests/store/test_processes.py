"""Several processes on one store, and processes that are killed."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk.store import ChunkStore, Entry, NewChunk

WORKER = Path(__file__).with_name("worker.py")


def start(job: str, folder: Path, number: int) -> "subprocess.Popen[str]":
    command = [sys.executable, str(WORKER), job, str(folder), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes: list["subprocess.Popen[str]"]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def test_four_processes_open_a_new_store_and_publish_the_same_entries(folder: Path, make: Any) -> None:
    finish([start("publish", folder, number) for number in range(4)])
    with ChunkStore(folder) as store:
        rows = store.list_chunks("default")
        assert [row.name for row in rows] == [f"name {i}" for i in range(12)]
        for i, entry in enumerate(store.load([make.key(row.id) for row in rows])):
            assert isinstance(entry, Entry)
            assert make.content(entry.tensors) == make.content(make.tensors(i))
        assert (store.stats("default").entries, store.damaged_count) == (12, 0)
        with store._index.read() as db:
            assert db.table("_sqlite_migrations").count == 1
    assert len(list(folder.rglob("*.safetensors"))) == 12
    assert list((folder / "tmp").iterdir()) == []


def test_publishing_deleting_and_damaging_at_once_never_gives_wrong_data(folder: Path) -> None:
    finish([start("churn", folder, number) for number in range(4)])
    with ChunkStore(folder) as store:
        digests = {path.stem for path in folder.glob("entries/*/*.safetensors")}
        with store._index.read() as db:
            assert {row["digest"] for row in db.table("entries").rows} == digests


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_leaves_a_good_store(folder: Path, make: Any, seed: int) -> None:
    process = start("write", folder, seed)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(random.Random(seed).uniform(0.0, 0.1))
    process.kill()
    process.communicate()
    with ChunkStore(folder) as store:
        with store._index.read() as db:
            rows = list(db.table("entries").rows)
        assert len(rows) >= 3
        from braidsdk.store import blobs

        for row in rows:
            blob = blobs.read(folder / "entries" / row["digest"][:2] / f"{row['digest']}.safetensors")
            assert make.content(blob.tensors) == make.content(make.tensors(seed))
        store.add_chunks([NewChunk("default", 1, "still works\n")])
        store.publish([(make.key(None), make.tensors(), {})])
        assert isinstance(store.load([make.key(None)])[0], Entry)


def test_workers_that_are_killed_lose_nothing(campaign: Callable[..., Any]) -> None:
    found = campaign("kills.py", "--kills", "30")
    assert found["wrong"] == []
    assert found["counts"]["acknowledged entries checked"] >= 10


@pytest.mark.campaign
def test_workers_that_are_killed_a_thousand_times_lose_nothing(
    campaign: Callable[..., Any], counted: Callable[..., None]
) -> None:
    found = campaign("kills.py", "--kills", "1000")
    counted(
        "SIGKILL at random while 4 processes put, get, collect and delete",
        found["counts"]["kills"],
        wrong=len(found["wrong"]),
    )
    assert found["wrong"] == []
    assert found["counts"]["kills"] >= 1000


@pytest.mark.parametrize("size", [(6, 12), pytest.param((32, 50), marks=pytest.mark.campaign)])
def test_processes_that_register_at_once_compute_each_entry_once(
    campaign: Callable[..., Any], counted: Callable[..., None], size: tuple[int, int]
) -> None:
    processes, keys = size
    found = campaign("together.py", "--processes", str(processes), "--keys", str(keys))
    twice = found["counts"]["computed"] - keys
    counted(
        f"{processes} processes, {keys} keys at once: computed once",
        processes * keys,
        wrong=twice + len(found["wrong"]),
    )
    assert found["wrong"] == []
    assert found["counts"] == {"computed": keys, "entries": keys, "errors": 0}


@pytest.mark.parametrize("size", [(6, 12), pytest.param((32, 50), marks=pytest.mark.campaign)])
def test_without_locks_entries_are_computed_twice_and_nothing_is_wrong(
    campaign: Callable[..., Any], counted: Callable[..., None], size: tuple[int, int]
) -> None:
    processes, keys = size
    found = campaign("together.py", "--processes", str(processes), "--keys", str(keys), "--without-locks")
    counted(f"{processes} processes, {keys} keys at once, without locks", processes * keys, wrong=len(found["wrong"]))
    assert found["wrong"] == []
    assert found["counts"]["entries"] == keys
    assert found["counts"]["computed"] >= keys + processes - 1, "all must have computed the first one"
