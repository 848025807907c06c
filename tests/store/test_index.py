"""The index and the folder: opening, migrations, rebuilding, sweeping, and what can't be opened."""

import errno
import os
import signal
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from braidsdk.errors import (
    StoreCorruptError,
    StoreError,
    StorePathError,
    StoreReadOnlyError,
    StoreReplacedError,
    StoreVersionError,
)
from braidsdk.store import ChunkStore, Entry, Hit, NewChunk, sha256_of_tokens
from braidsdk.store.files import Layout


def aside(folder: Path) -> None:
    """Take the index away."""
    for name in ("index.db", "index.db-journal"):
        if (folder / name).exists():
            (folder / name).rename(folder / f"old-{name}")


def test_a_store_is_created_with_its_parents(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "a" / "b") as store:
        assert store.path == tmp_path / "a" / "b"
        assert sorted(path.name for path in store.path.iterdir() if not path.name.startswith("index")) == [
            "chunks",
            "claims.lock",
            "damaged",
            "entries",
            "leases.lock",
            "queue.lock",
            "reserve",
            "tmp",
        ]


@pytest.mark.parametrize("below", ["", "store", "deep/store"])
def test_a_file_in_the_way_is_refused_and_left_alone(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorePathError, match="a file in the way"):
        ChunkStore(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root can't write to")
def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(StorePathError, match="must be writable"):
        ChunkStore("/proc/self/store")


@pytest.mark.parametrize("made", ["", "store"])
def test_a_folder_that_a_killed_process_made_is_synced_before_the_store_is_used(
    tmp_path: Path, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before it synced the folder's parent, so a power cut would take the whole store away."""
    (tmp_path / "a" / made).mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr("braidsdk.store.files.sync_folder", synced.append)
    ChunkStore(tmp_path / "a" / "store").close()
    assert (tmp_path / "a" / made).parent in synced
    synced.clear()
    ChunkStore(tmp_path / "a" / "store").close()
    assert synced == [tmp_path / "a" / "store"], "once there is an index, its folders are durable"


def test_a_folder_that_is_someone_elses_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.db").mkdir()
    with pytest.raises(StorePathError):
        ChunkStore(tmp_path)


def test_commits_are_durable_and_keys_are_enforced(store: ChunkStore) -> None:
    with store._index.read() as db:
        found = {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
        assert found == {"journal_mode": "delete", "synchronous": 3}
        for name in ("foreign_keys", "secure_delete"):
            assert db.execute(f"PRAGMA {name}").fetchone()[0] == 1
        assert db.execute("PRAGMA trusted_schema").fetchone()[0] == 0


def test_what_another_process_wrote_is_durable_before_it_is_acknowledged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one may have died right after its journal was removed, before it synced the folder."""
    with ChunkStore(folder) as one, ChunkStore(folder) as other:
        one.add_chunk(namespace="default", level=1, text="text")
        synced: list[Path] = []
        monkeypatch.setattr("braidsdk.store.index.sync_folder", synced.append)
        other.add_chunk(namespace="default", level=1, text="text")
        assert synced == [folder]
        other.add_chunk(namespace="default", level=1, text="text")  # removes the mark that the first one left

        def fail(_: Path) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("braidsdk.store.index.sync_folder", fail)
        with pytest.raises(StoreError, match="could not be made durable"):
            other.add_chunk(namespace="default", level=1, text="text")


def test_a_migration_is_applied_once(folder: Path) -> None:
    for _ in range(3):
        with ChunkStore(folder) as store, store._index.read() as db:
            assert [row["name"] for row in db.table("_sqlite_migrations").rows] == ["m001_tables"]


def test_threads_that_open_a_new_store_at_once_all_get_it(tmp_path: Path) -> None:
    for attempt in range(5):
        gate = threading.Barrier(6)

        def open_it(number: int, folder: Path = tmp_path / str(attempt), gate: threading.Barrier = gate) -> None:
            gate.wait()
            with ChunkStore(folder) as store:
                store.add_chunk(namespace="default", level=1, text=f"text {number}\n")

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(open_it, range(6)))
        with ChunkStore(tmp_path / str(attempt)) as store:
            assert len(store.list_chunks("default")) == 6


def test_a_migration_that_fails_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise sqlite3.OperationalError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("braidsdk.store.store.rebuild", fail)
        with pytest.raises(StoreError, match="planted"):
            ChunkStore(folder)
    with closing(sqlite3.connect(folder / "index.db")) as connection:
        assert connection.execute("select count(*) from sqlite_master").fetchone() == (0,)
    ChunkStore(folder).close()


def test_a_store_of_a_newer_version_is_refused(folder: Path) -> None:
    ChunkStore(folder).close()
    with closing(Database(folder / "index.db")) as db:
        db.table("_sqlite_migrations").insert({"migration_set": "braidsdk-store", "name": "m999_later"})
    with pytest.raises(StoreVersionError, match="m999_later"):
        ChunkStore(folder)


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough" * 50, b"SQLite format 3\0" + bytes(4080)]
)
def test_a_malformed_index_says_how_to_rebuild_it_and_nothing_is_deleted(
    folder: Path, make: Any, content: bytes
) -> None:
    with ChunkStore(folder) as store:
        store.publish([(make.key(None), make.tensors(), {})])
    (folder / "index.db").write_bytes(content)
    with pytest.raises(StoreCorruptError, match="braid store repair"):
        ChunkStore(folder)
    assert (folder / "index.db").read_bytes() == content
    aside(folder)
    with ChunkStore(folder) as store:
        assert isinstance(store.load([make.key(None)])[0], Entry)


def test_an_index_damaged_in_the_middle_is_named_when_it_is_met(folder: Path) -> None:
    with ChunkStore(folder) as store:
        store.add_chunks([NewChunk("default", 1, f"text {i} " * 50) for i in range(200)])
    content = bytearray((folder / "index.db").read_bytes())
    pages = range(4096 * 12, len(content), 4096)
    for page in pages:
        content[page : page + 100] = b"\xff" * 100
    (folder / "index.db").write_bytes(content)
    with pytest.raises(StoreCorruptError), ChunkStore(folder) as store:
        store.list_chunks("default")


def test_a_missing_index_is_rebuilt_from_the_files(folder: Path, make: Any) -> None:
    texts = ["zebra: naïve\n", "apple\n", "mango \N{SNOWMAN}\n"]
    with ChunkStore(folder) as store:
        rows = store.add_chunks([NewChunk("default", 1, text, f"name {i}", {"i": i}) for i, text in enumerate(texts)])
        store.add_chunk(namespace="default", level=1, text="without an entry\n")
        keys = [make.key(None, level=0), *(make.key(row.id) for row in rows)]
        keys.append(make.key(rows[1].id, after=(None, rows[0].id), after_sha256=sha256_of_tokens((1,))))
        for i, key in enumerate(keys):
            store.publish([(key, make.tensors(i), {"i": i})])
        hits = store.look_up(keys)
    aside(folder)
    with ChunkStore(folder) as store:
        assert store.look_up(keys) == hits
        for i, entry in enumerate(store.load(keys)):
            assert isinstance(entry, Entry)
            assert make.content(entry.tensors) == make.content(make.tensors(i))
        assert [row.text for row in store.list_chunks("default")] == [*texts, "without an entry\n"]
        assert [row.names for row in store.list_chunks("default")] == [("name 0",), ("name 1",), ("name 2",), ()]
        assert store.damaged_count == 0
        assert len(store.delete_chunk("default", rows[0].id)) == 2  # the chain that saw it too


def test_an_anchor_without_an_entry_of_its_own_still_takes_its_chains_along(folder: Path, make: Any) -> None:
    with ChunkStore(folder) as store:
        anchor, chunk = store.add_chunks([NewChunk("default", 0, "rules\n"), NewChunk("default", 1, "text\n")])
        key = make.key(chunk.id, after=(anchor.id,), after_sha256=sha256_of_tokens((1,)))
        store.publish([(key, make.tensors(), {})])
    aside(folder)
    with ChunkStore(folder) as store:
        assert isinstance(store.look_up([key])[0], Hit)
        assert store.delete_chunk("default", anchor.id) == (key.digest,)


def test_a_rebuild_sets_aside_what_is_not_an_entry(folder: Path, make: Any) -> None:
    with ChunkStore(folder) as store:
        rows = store.add_chunks([NewChunk("default", 1, f"text {i}\n") for i in range(4)])
        keys = [make.key(row.id) for row in rows]
        store.publish([(key, make.tensors(), {}) for key in keys])
        paths = [hit.path for hit in store.look_up(keys) if isinstance(hit, Hit)]
    paths[0].write_bytes(b"junk")
    paths[1].write_bytes(paths[2].read_bytes())
    paths[3].write_bytes(paths[3].read_bytes().replace(b"text 3", b"text 4"))
    aside(folder)
    with ChunkStore(folder) as store:
        assert len(store.list_chunks("default")) == 4, "the chunks have files of their own"
        assert store.damaged_count == 3
        assert [isinstance(found, Hit) for found in store.look_up(keys)] == [False, False, True, False]
        assert {miss.reason for miss in store.explain([*keys[:2], keys[3]])} == {"damaged"}


def test_a_rebuild_knows_entries_in_their_own_places_only(folder: Path, make: Any) -> None:
    with ChunkStore(folder) as store:
        store.publish([(make.key(None), make.tensors(), {})])
    (path,) = folder.glob("entries/*/*.safetensors")
    other = folder / "entries" / "zz" / path.name
    other.parent.mkdir()
    path.rename(other)
    aside(folder)
    with ChunkStore(folder) as store:
        assert store.stats("default").entries == 0
    assert other.exists()


def test_a_rebuild_leaves_the_files_of_another_format_alone(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChunkStore(folder) as store, monkeypatch.context() as patch:
        patch.setattr("braidsdk.store.blobs.FORMAT_VERSION", 99)
        store.publish([(make.key(None), make.tensors(), {})])
    aside(folder)
    with ChunkStore(folder) as store:
        assert (store.stats("default").entries, store.damaged_count) == (0, 0)
    (path,) = folder.glob("entries/*/*.safetensors")
    os.utime(path, (0, 0))
    monkeypatch.setattr("braidsdk.store.collect.SWEEP_EVERY_S", 0)
    ChunkStore(folder).close()
    assert path.exists(), "the sweep leaves them alone too"


def test_a_stale_journal_does_not_come_back_in_a_new_index(folder: Path) -> None:
    """That of a process that was killed in the middle of a transaction."""
    with ChunkStore(folder) as store:
        store.add_chunks([NewChunk("default", 1, f"text {n}\n" * 400, f"{n}") for n in range(40)])
    with closing(sqlite3.connect(folder / "index.db")) as db:
        db.execute("PRAGMA cache_size=5")
        db.execute("update chunks set text = 'x'")  # more pages than the cache holds, so the journal is written
        journal = (folder / "index.db-journal").read_bytes()
    assert len(journal) > 4096
    aside(folder)
    (folder / "index.db-journal").write_bytes(journal)
    for _ in range(2):
        with ChunkStore(folder) as store:
            assert [row.text for row in store.list_chunks("default")] == [f"text {n}\n" * 400 for n in range(40)]


def foreign_journal(index: bytes, names: Path) -> bytes:
    """A hot journal that changes nothing, and names another file as the journal of several databases."""
    magic = bytes.fromhex("d9d505f920a163d7")
    page, nonce, name = index[:4096], 7, str(names).encode()
    checksum = (nonce + sum(page[at] for at in range(len(page) - 200, 0, -200))) & 0xFFFFFFFF
    head = magic + struct.pack(">IIIII", 1, nonce, len(index) // 4096, 512, 4096)
    record = struct.pack(">I", 1) + page + struct.pack(">I", checksum)
    end = struct.pack(">I", 2**30 // 4096 + 1) + name + struct.pack(">II", len(name), sum(name)) + magic
    return head.ljust(512, b"\0") + record + end


def test_a_journal_that_names_a_file_elsewhere_deletes_nothing(folder: Path, tmp_path: Path, make: Any) -> None:
    """SQLite would delete that file, because it names no journal that is there."""
    with ChunkStore(folder) as store:
        store.publish([(make.key(None), make.tensors(), {})])
    precious, journal = tmp_path / "precious", folder / "index.db-journal"
    precious.write_text("mine")
    journal.write_bytes(foreign_journal((folder / "index.db").read_bytes(), precious))
    with pytest.raises(StoreCorruptError, match="must name no other file"):
        ChunkStore(folder)
    assert precious.read_text() == "mine"
    assert journal.exists()
    aside(folder)
    with ChunkStore(folder) as store:
        assert isinstance(store.load([make.key(None)])[0], Entry)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock says."""
    monkeypatch.setattr("braidsdk.store.collect.SWEEP_EVERY_S", 0)
    with ChunkStore(folder) as store:
        store.publish([(make.key(None), make.tensors(), {})])
        good = store.look_up([make.key(None)])[0]
        assert isinstance(good, Hit)
        part = "." + "a" * 32 + "." + "b" * 8 + ".part"
        names = {
            "tmp/" + "d" * 16 + ".lock": True,
            "tmp/" + "d" * 16 + part: True,
            "tmp/" + "e" * 16 + part: True,
            "tmp/mine.txt": False,
            "entries/aa/" + "a" * 32 + ".safetensors": True,
            "entries/aa/mine.safetensors": False,
            f"tmp/{store._layout._owner}.lock": False,
            f"tmp/{store._layout._owner}{part}": False,
        }
        (folder / "entries" / "aa").mkdir(exist_ok=True)
        for past in (0, time.time() + 10**6):
            for name in names:
                (folder / name).touch()
            for path in (good.path, *(folder / name for name in names)):
                os.utime(path, (past, past))
            with ChunkStore(folder) as other:
                assert {name: not (folder / name).exists() for name in names} == names
                assert isinstance(other.load([make.key(None)])[0], Entry)
    with ChunkStore(folder):
        assert not list((folder / "tmp").glob("*.part")), "it was closed"


def test_processes_that_open_and_sweep_at_once_never_take_each_other_for_dead(folder: Path) -> None:
    ChunkStore(folder).close()

    def open_and_close(_: int) -> None:
        for _ in range(40):
            with ChunkStore(folder) as store:
                assert (folder / "tmp" / f"{store._layout._owner}.lock").exists()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(open_and_close, range(6)))
    assert list((folder / "tmp").iterdir()) == []


def test_opening_lists_the_entries_once_a_day_whoever_opens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[float] = []
    now = time.time()

    def digests(_: Layout) -> Iterator[str]:
        listed.append(now)
        return iter(())

    ChunkStore(folder).close()
    monkeypatch.setattr(Layout, "digests", digests)
    for hours, lists in ((1, False), (23, False), (25, True), (26, False), (50, True), (3, True), (4, False)):
        listed.clear()
        monkeypatch.setattr(time, "time", lambda hours=hours: now + hours * 3600)
        for _ in range(2):
            ChunkStore(folder).close()
        assert len(listed) == lists, f"after {hours} hours; from 50 back to 3 the clock was put right"


def test_of_several_that_find_a_sweep_due_one_sweeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [ChunkStore(folder) for _ in range(4)]
    now, gate, claimed = time.time(), threading.Barrier(4), []
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)

    def claim(store: ChunkStore) -> None:
        gate.wait()
        claimed.append(store._collector._claim_sweep())
        store.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(claim, stores))
    assert sorted(claimed) == [False, False, False, True]


class Interrupted:
    """A connection on which Ctrl-C comes right after some statements, counted from 1."""

    def __init__(self, connection: sqlite3.Connection, *after: int) -> None:
        self._connection, self._after, self._count = connection, after, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self._count += 1
        cursor = self._connection.execute(*arguments)
        if self._count in self._after:
            raise KeyboardInterrupt
        return cursor


@pytest.mark.parametrize("after", [(1,), (2,), (1, 2)], ids=["begin", "commit", "begin and rollback"])
def test_an_interrupt_leaves_no_transaction_open(
    store: ChunkStore, folder: Path, monkeypatch: pytest.MonkeyPatch, after: tuple[int, ...]
) -> None:
    db = store._index._db
    assert db is not None
    with monkeypatch.context() as patch:
        patch.setattr(db, "conn", Interrupted(db.conn, *after))
        with pytest.raises(KeyboardInterrupt), store._index.write():
            pass
    assert not db.conn.in_transaction
    with closing(sqlite3.connect(folder / "index.db", timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")


def test_ctrl_c_while_waiting_for_the_write_lock_leaves_it_free(store: ChunkStore, folder: Path) -> None:
    with closing(sqlite3.connect(folder / "index.db", check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")

        def interrupt() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            other.rollback()

        thread = threading.Timer(0.1, interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt), store._index.write():
            pass
        thread.join()
        other.execute("BEGIN IMMEDIATE")


def test_a_store_used_after_a_fork_says_so(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(StoreError, match="fork"):
        store.list_chunks("default")


def test_a_closed_store_leaves_loaded_entries_valid(folder: Path, make: Any) -> None:
    with ChunkStore(folder) as store:
        store.publish([(make.key(None), make.tensors(), {})])
        (entry,) = store.load([make.key(None)])
    assert isinstance(entry, Entry)
    assert make.content(entry.tensors) == make.content(make.tensors())


def test_a_thread_that_cannot_start_is_a_store_error(
    store: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [make.key(None), make.key(None, level=0)]

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreError, match="limit of threads"):
            store.publish([(key, make.tensors(), {}) for key in keys])
        store.publish([(keys[0], make.tensors(), {})])  # one entry needs none
        assert isinstance(store.load(keys[:1])[0], Entry)
        with pytest.raises(StoreError, match="limit of threads"):
            store.load(keys)
    store.publish([(key, make.tensors(), {}) for key in keys])
    assert all(isinstance(each, Entry) for each in store.load(keys))


def test_a_passing_error_is_told_from_damage_and_the_store_goes_on(
    store: ChunkStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_chunk(namespace="default", level=1, text="one")
    for code, says in ((sqlite3.SQLITE_CORRUPT, "it is sound"), (sqlite3.SQLITE_IOERR, "could not be used")):

        def fail(*_: object, code: int = code, **__: object) -> None:
            error = sqlite3.DatabaseError("planted")
            error.sqlite_errorcode = code
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("braidsdk.store.chunks.select", fail)
            with pytest.raises(StoreError, match=says) as caught:
                store.list_chunks("default")
        assert not isinstance(caught.value, StoreCorruptError)
        assert len(store.list_chunks("default")) == 1
        with closing(sqlite3.connect(folder / "index.db", timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")


@pytest.mark.parametrize(
    "sql",
    [
        "create trigger t after insert on chunks begin delete from chunks; end",
        "create view v as select * from chunks",
        "alter table entries add column more text",
        "drop index idx_chunks_id",
    ],
)
def test_an_index_with_other_tables_is_refused(folder: Path, sql: str) -> None:
    ChunkStore(folder).close()
    with closing(sqlite3.connect(folder / "index.db")) as db:
        db.execute(sql)
        db.commit()
    with pytest.raises(StoreCorruptError, match="must have the tables that this version makes"):
        ChunkStore(folder)


@pytest.mark.parametrize(
    "sql",
    [
        "update entries set record = 'null'",
        "update entries set record = '{\"level\":1}'",
        "update entries set record = ?",
        "update entries set payload_digest = 'x'",
        "update damage set chunks = '7'",
    ],
)
def test_a_row_that_this_store_does_not_write_is_damage_when_it_is_met(folder: Path, make: Any, sql: str) -> None:
    with ChunkStore(folder) as store:
        row = store.add_chunk(namespace="default", level=1, text="one\n")
        keys = [make.key(row.id), make.key(row.id, after=(None,))]
        store.publish([(key, make.tensors(), {}) for key in keys])
        next(folder.glob("entries/*/*.safetensors")).unlink()
        store.load(keys)
    with closing(sqlite3.connect(folder / "index.db")) as db:
        db.execute(sql, ["[" * 100_000] * sql.count("?"))
        db.commit()
    with ChunkStore(folder) as store:
        assert not store.check().is_sound
        with pytest.raises(StoreCorruptError, match="digest must be" if "payload" in sql else "does not write"):
            store.explain([make.key(row.id, level=0)]), store.load(keys), store.delete_chunk("default", row.id)
    aside(folder)
    with ChunkStore(folder) as store:
        assert sum(isinstance(each, Entry) for each in store.load(keys)) == 1


def test_our_own_mistake_is_not_called_damage(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("planted")

    monkeypatch.setattr("braidsdk.store.chunks.select", fail)
    with pytest.raises(TypeError, match="planted"):
        store.list_chunks("default")


def test_an_index_whose_schema_is_not_utf_8_is_damage(folder: Path) -> None:
    ChunkStore(folder).close()
    content = (folder / "index.db").read_bytes()
    (folder / "index.db").write_bytes(content.replace(b'"chunks" (', b'"chunks" \xa0'))
    with pytest.raises(StoreCorruptError, match="must be intact"):
        ChunkStore(folder)


def test_an_index_that_is_a_link_is_refused_and_not_followed(folder: Path, tmp_path: Path) -> None:
    ChunkStore(folder).close()
    (folder / "index.db").unlink()
    (tmp_path / "mine.db").touch()
    (folder / "index.db").symlink_to(tmp_path / "mine.db")
    with pytest.raises(StorePathError, match="it is a link"):
        ChunkStore(folder)
    assert (tmp_path / "mine.db").stat().st_size == 0


def test_a_time_of_the_last_sweep_that_is_none_is_forgotten(folder: Path) -> None:
    with ChunkStore(folder) as store:
        store.remember({"swept": "x"})
    with ChunkStore(folder) as store:
        assert float(store.recall(["swept"])["swept"]) > 0


def test_a_store_that_is_replaced_acknowledges_nothing(folder: Path, make: Any) -> None:
    with ChunkStore(folder) as store:
        store.publish([(make.key(None), make.tensors(), {})])
        folder.rename(folder.with_name("elsewhere"))
        ChunkStore(folder).close()
        for call in (
            lambda: store.add_chunk(namespace="default", level=1, text="lost"),
            lambda: store.publish([(make.key(None, level=0), make.tensors(), {})]),
            lambda: store.load([make.key(None)]),
            lambda: store.delete_chunk("default", "0" * 32),
            store.version,
        ):
            with pytest.raises(StoreReplacedError, match="removed or replaced"):
                call()
    with ChunkStore(folder) as store:
        assert (store.list_chunks("default"), store.stats("default").entries) == ([], 0)


def test_a_store_that_can_only_be_read_serves_and_says_so_when_it_is_written_to(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChunkStore(folder) as store:
        row = store.add_chunk(namespace="default", level=1, text="one", name="it")
        key = make.key(row.id)
        store.publish([(key, make.tensors(), {})])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    opened = os.open

    def read_only(path: Any, flags: int, *more: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    with ChunkStore(folder) as store:
        assert store.read_only
        assert isinstance(store.load([key])[0], Entry)
        assert store.find_named("default", ["it"])["it"].text == "one"
        store.remember({"a": "b"})
        for call in (
            lambda: store.add_chunk(namespace="default", level=1, text="two"),
            lambda: store.publish([(make.key(None), make.tensors(), {})]),
            lambda: store.delete_chunk("default", row.id),
            lambda: store.update_chunk("default", row.id, metadata={}),
        ):
            with pytest.raises(StoreReadOnlyError, match="can only be read"):
                call()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(StorePathError, match="must be writable"):
        ChunkStore(folder.with_name("nothing"))
