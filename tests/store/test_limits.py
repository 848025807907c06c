"""A store stays within its limits: what is evicted, what stays, and that nothing else is lost."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk.errors import InputError, StoreError, StoreFullError, StoreReadOnlyError, StoreReplacedError
from braidsdk.store import WHOLE, ChunkStore, Entry, EntryKey, Limit, claims, collect, entries, repair

DAY_S = 86_400


def put(store: ChunkStore, make: Any, number: int, namespace: str = "default") -> EntryKey:
    row = store.add_chunk(namespace=namespace, level=1, text=f"text {number:03d}")
    key: EntryKey = make.key(row.id, namespace=namespace)
    store.publish([(key, make.tensors(number), {})])
    return key


def there(store: ChunkStore, keys: list[EntryKey]) -> list[int]:
    return [number for number, hit in enumerate(store.look_up(keys)) if hit]


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("entries/*/*.safetensors"))


@pytest.fixture
def one(store: ChunkStore, make: Any) -> int:
    """The size of one entry's file."""
    put(store, make, 999)
    (path,) = store.path.glob("entries/*/*.safetensors")
    size = path.stat().st_size
    store.delete_chunks("default", store.chunk_ids("default"))
    return size


def test_publishing_keeps_the_limit_and_evicts_what_is_least_used(
    store: ChunkStore, folder: Path, make: Any, one: int
) -> None:
    assert store.set_limit(Limit(max_bytes=5 * one)).evicted == 0
    keys = [put(store, make, n) for n in range(5)]
    for _ in range(3):
        assert all(store.load([keys[0], keys[3]]))
    for n in range(5, 8):
        keys.append(put(store, make, n))
        assert size_on_disk(folder) <= 5 * one
    assert {0, 3, 7} <= set(there(store, keys))
    assert len(there(store, keys)) == 5
    assert len(store.list_chunks("default")) == 8, "texts stay"
    assert store.check(1.0).is_sound
    assert store.damaged_count == 0
    gone = next(n for n in range(8) if n not in there(store, keys))
    store.publish([(keys[gone], make.tensors(gone), {})])
    (found,) = store.load([keys[gone]])
    assert isinstance(found, Entry)
    assert make.content(found.tensors) == make.content(make.tensors(gone)), "it was computed again"


def test_uses_outlive_the_process_and_decay(folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "HALF_LIFE", 4.0)
    with ChunkStore(folder) as store:
        keys = [put(store, make, n) for n in range(3)]
        for _ in range(20):
            store.load([keys[0]])
    with ChunkStore(folder) as store:
        for _ in range(40):  # ten half-lives later
            store.load([keys[1]])
        store.remember({}, add={})
        with store._index.read() as db:
            order = [digest for digest, _, _ in entries.evictable(db, None)]
    assert order == [keys[2].digest, keys[0].digest, keys[1].digest]


def test_worth_is_uses_per_byte(store: ChunkStore, make: Any) -> None:
    large, small = put(store, make, 0), put(store, make, 1)
    with store._index.write() as db:
        db.execute("update entries set size = size * 8, worth = worth - 3 where digest = ?", [large.digest])
    for _ in range(3):
        store.load([large])
    store.remember({}, add={})
    with store._index.read() as db:
        assert [digest for digest, _, _ in entries.evictable(db, None)] == [large.digest, small.digest]


def test_the_worth_is_the_sum_of_decayed_uses(store: ChunkStore, make: Any) -> None:
    key = put(store, make, 0)
    for count in (3, 5):
        store.count_uses([key.digest] * count)
        store.remember({}, add={})
    with store._index.read() as db:
        worth, size = db.execute("select worth, size from entries").fetchone()
    half = entries.HALF_LIFE
    assert 2**worth * size == pytest.approx(1 + 3 * 2 ** (3 / half) + 5 * 2 ** (8 / half))


def test_namespaces_have_limits_of_their_own(store: ChunkStore, make: Any, one: int) -> None:
    store.set_limit(Limit(max_bytes=2 * one), "small")
    keys = {name: [put(store, make, n, name) for n in range(4)] for name in ("small", "large")}
    assert (len(there(store, keys["small"])), len(there(store, keys["large"]))) == (2, 4)
    assert store.set_limit(Limit(max_bytes=3 * one)).evicted == 3
    assert len(there(store, keys["small"])) + len(there(store, keys["large"])) == 3
    assert store.set_limit(Limit(max_bytes=0)).evicted == 3
    assert store.limits() == {"small": Limit(2 * one), WHOLE: Limit(0)}


def test_what_was_stored_just_now_goes_last(store: ChunkStore, make: Any, one: int) -> None:
    store.set_limit(Limit(max_bytes=one))
    first = put(store, make, 0)
    for _ in range(50):
        store.load([first])
    second = put(store, make, 1)
    assert there(store, [first, second]) == [1]
    store.set_limit(Limit(max_bytes=one // 2))
    third = put(store, make, 2)
    assert there(store, [first, second, third]) == [2], "one entry over the limit, or nothing could be used"


def test_pinned_chunks_stay(store: ChunkStore, make: Any, one: int) -> None:
    keys = [put(store, make, n) for n in range(4)]
    store.update_chunk("default", str(keys[1].chunk_id), pinned=True)
    done = store.set_limit(Limit(max_bytes=one // 2))
    assert (done.evicted, done.over_bytes) == (3, one - one // 2)
    assert there(store, keys) == [1]
    store.update_chunk("default", str(keys[1].chunk_id), pinned=False)
    assert store.collect().evicted == 1


def test_what_is_read_is_not_evicted(store: ChunkStore, folder: Path, make: Any) -> None:
    keys = [put(store, make, n) for n in range(4)]
    for evictor in (store, ChunkStore(folder)):
        with evictor:
            reading = store.stream(keys[:2])
            assert isinstance(next(reading), Entry)
            evictor.set_limit(Limit(max_bytes=0))
            assert there(store, keys) == [0, 1]
            assert isinstance(next(reading), Entry)
            assert next(reading, None) is None
            assert evictor.collect().evicted == 2
        if evictor is store:
            store = ChunkStore(folder)
            store.set_limit(Limit())
            store.publish([(key, make.tensors(n), {}) for n, key in enumerate(keys)])
    store.close()


def test_a_lease_ends_with_its_process(store: ChunkStore, folder: Path, make: Any) -> None:
    key = put(store, make, 0)
    code = (
        "import sys, time; from braidsdk.store import ChunkStore\n"
        "store = ChunkStore(sys.argv[1]); held = store._leases.hold([sys.argv[2]]); held.__enter__()\n"
        "print('held', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(folder), key.digest]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "held\n"
        assert store.set_limit(Limit(max_bytes=0)).evicted == 0
        reader.kill()
    assert store.collect().evicted == 1


def test_entries_that_nobody_uses_grow_old(store: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [put(store, make, n) for n in range(3)]
    store.set_limit(Limit(max_age_s=10 * DAY_S))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 9 * DAY_S)
    assert all(store.load([keys[1]]))
    assert store.collect().evicted == 0
    monkeypatch.setattr(time, "time", lambda: now + 11 * DAY_S)
    store.remember({}, add={"something": 1})
    assert store.collect().evicted == 2
    assert there(store, keys) == [1]
    monkeypatch.setattr(time, "time", lambda: now - 100 * DAY_S)  # the clock is put back
    assert store.collect().evicted == 0


def test_old_entries_go_once_a_day_when_the_store_is_opened(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChunkStore(folder) as store:
        key = put(store, make, 0)
        store.set_limit(Limit(max_age_s=DAY_S))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * DAY_S)
    with ChunkStore(folder) as store:
        assert there(store, [key]) == []


def test_more_entries_than_one_transaction_takes(
    store: ChunkStore, folder: Path, make: Any, one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "BATCH", 3)
    keys = [put(store, make, n) for n in range(11)]
    assert store.set_limit(Limit(max_bytes=2 * one)).evicted == 9
    assert len(there(store, keys)) == 2
    assert size_on_disk(folder) == 2 * one


def test_limits_are_kept_and_shared(store: ChunkStore, folder: Path) -> None:
    store.set_limit(Limit(1e9, 3.5), "a")
    store.set_limit(Limit(), "b")
    with ChunkStore(folder) as other:
        assert other.limits() == {"a": Limit(1e9, 3.5)}
        other.set_limit(Limit(), "a")
    assert store.limits() == {}
    assert (folder / "limits.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["[]", "{", '{"": {"max_bytes": -1}}', '{"": {"more": 1}}', '{"": 3}', "[" * 9999])
def test_limits_that_can_not_be_read_are_said_and_lose_nothing(
    store: ChunkStore, folder: Path, make: Any, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "limits.json").write_text(content)
    with pytest.raises(StoreError, match=r"limits\.json"):
        store.collect()
    assert there(store, [put(store, make, 0)]) == [0]
    monkeypatch.setattr(collect, "SWEEP_EVERY_S", 0)
    with ChunkStore(folder) as other:
        assert len(other.list_chunks("default")) == 1
    before = (folder / "index.db").stat().st_ino
    assert repair(folder).old_index is None
    assert (folder / "index.db").stat().st_ino == before, "it is sound"


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "5", True, 2**70])
def test_a_limit_is_a_number(wrong: Any) -> None:
    for name in ("max_bytes", "max_age_s"):
        with pytest.raises(InputError, match="at least 0"):
            Limit(**{name: wrong})


def test_a_store_that_can_only_be_read_collects_nothing(folder: Path, make: Any) -> None:
    with ChunkStore(folder) as store:
        put(store, make, 0)
    with ChunkStore(folder) as store:
        store._index._read_only = True
        for call in (lambda: store.set_limit(Limit(0)), store.collect):
            with pytest.raises(StoreReadOnlyError):
                call()


def test_collecting_removes_what_is_left_over(store: ChunkStore, folder: Path, make: Any) -> None:
    key = put(store, make, 0)
    (path,) = folder.glob("entries/*/*.safetensors")
    stray = path.with_name(path.name[:2] + "0" * 30 + ".safetensors")
    stray.write_bytes(path.read_bytes())
    path.write_bytes(b"junk")
    assert store.load([key]) == [None]
    mine = folder / "damaged" / "mine.txt"
    mine.touch()
    done = store.collect()
    assert (done.strays, done.damaged) == (1, 0)
    assert not stray.exists()
    assert store.collect(damaged_s=-1).damaged == 1
    assert list((folder / "damaged").iterdir()) == [mine]


def full_while(store: ChunkStore, monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> None:
    """Transactions of this store meet a full disk for as long as that is so."""
    place = type(store._index)._transaction

    def transaction(self: Any, begin: Any) -> Any:
        if begin.__name__ == "_begin_writing" and is_full():
            raise StoreFullError("The disk is full.")
        return place(self, begin)

    monkeypatch.setattr(type(store._index), "_transaction", transaction)


def test_deleting_and_evicting_use_the_reserve_of_a_full_disk(
    store: ChunkStore, folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [put(store, make, n) for n in range(3)]
    reserve = folder / "reserve"
    assert reserve.stat().st_blocks * 512 >= 2**20
    full_while(store, monkeypatch, reserve.exists)
    with pytest.raises(StoreFullError):
        put(store, make, 3)
    assert store.delete_chunk("default", str(keys[0].chunk_id)) == (keys[0].digest,)
    assert reserve.exists(), "for the next time"
    monkeypatch.setattr(store._layout, "keep_reserve", lambda: None)
    (folder / "limits.json").write_text(json.dumps({"": {"max_bytes": 0, "max_age_s": None}}))
    assert store._collector.evict().evicted == 2
    assert not reserve.exists()
    full_while(store, monkeypatch, lambda: True)
    with pytest.raises(StoreFullError):
        store.delete_chunks("default", store.chunk_ids("default"))


def test_no_room_for_the_reserve_is_no_error(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.path / "reserve").unlink()

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    store._layout.keep_reserve()
    assert not (store.path / "reserve").exists()


def mixed(folder: Path, make: Any, seconds: float, limit: int, counts: dict[str, int]) -> list[str]:
    """Readers, writers and collectors for some time. Returns what went wrong."""
    wrong: list[str] = []
    until = time.monotonic() + seconds
    pinned = ChunkStore(folder)
    kept = [put(pinned, make, n) for n in range(3)]
    for key in kept:
        pinned.update_chunk("default", str(key.chunk_id), pinned=True)
    pinned.set_limit(Limit(max_bytes=limit))

    def write(number: int) -> None:
        choose = random.Random(number)
        with ChunkStore(folder) as store:
            while time.monotonic() < until:
                put(store, make, choose.randrange(3, 60))
                counts["written"] += 1

    def read(number: int) -> None:
        choose = random.Random(number)
        with ChunkStore(folder) as store:
            while time.monotonic() < until:
                rows = store.list_chunks("default")
                some = [make.key(row.id) for row in choose.sample(rows, min(4, len(rows)))]
                with store._leases.hold(key.digest for key in some):
                    before = store.look_up(some)
                    for _ in range(3):
                        for key, hit, entry in zip(some, before, store.load(some), strict=True):
                            text = next(row.text for row in rows if row.id == key.chunk_id)
                            if hit and entry is None:
                                wrong.append(f"{text} was in use and is gone")
                            if entry and make.content(entry.tensors) != make.content(make.tensors(int(text[5:]))):
                                wrong.append(f"{text} is wrong")
                            counts["read"] += 1
                if not all(store.load(kept)):
                    wrong.append("a pinned entry is gone")

    code = (
        "import sys; from braidsdk.store import ChunkStore\n"
        "store = ChunkStore(sys.argv[1])\n"
        "while True: store.collect()"
    )

    def collecting() -> None:
        choose = random.Random(7)
        while time.monotonic() < until:
            process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
            time.sleep(choose.uniform(0.4, 1.0))
            process.kill()
            process.wait()
            counts["collectors killed"] += 1

    workers = [threading.Thread(target=each, args=(n,)) for n, each in enumerate((write, write, read, read))]
    workers.append(threading.Thread(target=collecting))
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    pinned.collect()
    one = max(path.stat().st_size for path in folder.glob("entries/*/*.safetensors"))
    if size_on_disk(folder) > limit + one:
        wrong.append(f"{size_on_disk(folder)} bytes, the limit is {limit}")
    if pinned.damaged_count or not pinned.check(1.0).is_sound:
        wrong.append("it is not sound")
    pinned.close()
    return wrong


def test_readers_writers_and_collectors(folder: Path, make: Any, one: int) -> None:
    counts = {"written": 0, "read": 0, "collectors killed": 0}
    assert mixed(folder, make, 4.0, 12 * one, counts) == []
    assert min(counts.values()) > 2


@pytest.mark.campaign
def test_readers_writers_and_collectors_for_long(
    folder: Path, make: Any, one: int, counted: Callable[..., None]
) -> None:
    counts = {"written": 0, "read": 0, "collectors killed": 0}
    wrong = mixed(folder, make, 120.0, 12 * one, counts)
    counted("reads beside writers and collectors that are killed, 120 s", counts["read"], wrong=len(wrong))
    counted("collectors killed meanwhile", counts["collectors killed"])
    assert wrong == []


def test_uses_that_are_not_kept_yet_count(store: ChunkStore, make: Any, one: int) -> None:
    keys = [put(store, make, n) for n in range(4)]
    for _ in range(9):
        store.load([keys[1]])
    store.set_limit(Limit(max_bytes=one))
    assert there(store, keys) == [1]


def test_a_process_that_only_reads_keeps_its_uses(
    store: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = put(store, make, 0)
    monkeypatch.setattr("braidsdk.store.store.KEEP_USES_S", 0.0)
    store.count_uses([key.digest] * 50)
    store.known_chunks("default", [str(key.chunk_id)])
    with store._index.read() as db:
        assert int(db.execute("select value from memory where key = 'uses'").fetchone()[0]) >= 50


def test_an_interrupted_lease_ends(store: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [put(store, make, n) for n in range(3)]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(claims.time, "sleep", interrupt)
    with store._leases.evicting() as taken:
        assert taken.take(keys[2].digest)
        with pytest.raises(KeyboardInterrupt), store._leases.hold(key.digest for key in keys):
            pass
    assert store.set_limit(Limit(max_bytes=0)).evicted == 3


def test_a_stopped_evictor_does_not_stop_readers(store: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(store, make, 0)
    monkeypatch.setattr(claims, "EVICTION_S", 0.01)
    with store._leases.evicting() as taken:
        assert taken.take(key.digest)
        assert isinstance(store.load([key])[0], Entry)
        assert not store._leases._held


def test_nonsense_in_the_index_is_damage_or_harmless(store: ChunkStore, folder: Path, make: Any) -> None:
    key = put(store, make, 0)
    for value in ("abc", "9" * 400, "-5"):
        store.remember({entries.USES: value})
        store.load([key])
        store.publish([(make.key(key.chunk_id, tokens=(1, len(value))), make.tensors(), {})])
    with store._index.write() as db:
        db.execute("update entries set size = 0")
    assert not store.check().is_sound
    store.load([key])
    store.close()
    assert not list((folder / "tmp").iterdir()), "it was closed all the same"


def test_looking_at_a_removed_store_says_so(store: ChunkStore, folder: Path, make: Any) -> None:
    put(store, make, 0)
    shutil.rmtree(folder)
    for call in (store.check, store.collect):
        with pytest.raises(StoreReplacedError):
            call()
