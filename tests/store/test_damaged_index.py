"""The index and its journal, damaged at random or forged: every call ends in a typed error or a right answer, nothing
outside the store is touched, and a repair finds every sound entry again.

Right is what digests cover: entries, and the texts of chunks by their ids. Nothing covers names, metadata and counts. A
part runs always, all of it by `pytest -m campaign`.
"""

import os
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from braidsdk.errors import BraidError, StoreVersionError
from braidsdk.store import ChunkStore, EntryKey, NewChunk, blobs, chunk_id, counters, repair, sha256_of_tokens

PAGE = 4096
MAGIC = bytes.fromhex("d9d505f920a163d7")
NAMESPACES = ("default", "other")


class Sample:
    """A store, its content, and files beside it that nobody may touch."""

    def __init__(self, folder: Path, make: Any) -> None:
        self.folder, self.make = folder / "sample", make
        self.outside = folder / "outside"
        (self.outside / "aa").mkdir(parents=True)
        names = ("precious", "precious.safetensors", "index.db", f"aa/{'a' * 32}.safetensors", "queue.lock")
        self.canaries = [self.outside / name for name in names]
        for canary in self.canaries:
            canary.write_text("mine")
            os.utime(canary, (1, 2))  # the next read changes the first, where the disk keeps it at all
        self.there = self.seen()
        self.texts = {chunk_id(space, 1, text): text for space in NAMESPACES for text in self.texts_of(space)}
        self.texts[chunk_id("default", 1, "new\n")] = "new\n"
        with ChunkStore(self.folder) as store:
            rows = [
                row
                for space in NAMESPACES
                for row in store.add_chunks(
                    [NewChunk(space, 1, text, f"name {n}", {"n": n}) for n, text in enumerate(self.texts_of(space))]
                )
            ]
            self.keys: list[EntryKey] = [make.key(row.id, namespace=row.namespace) for row in rows[::4]]
            anchored = {"after": (rows[0].id,), "after_sha256": sha256_of_tokens((1,))}
            self.keys += [make.key(None, level=0), make.key(rows[1].id, **anchored)]
            self.content = {key: make.content(make.tensors(n)) for n, key in enumerate(self.keys)}
            store.publish([(key, make.tensors(n), {"n": n}) for n, key in enumerate(self.keys)])
            store.remember({"a": "b"}, add={counters("default")[0]: 7})
            damaged = make.key(rows[2].id)
            store.publish([(damaged, make.tensors(9), {})])
            (hit,) = store.look_up([damaged])
            assert hit
            hit.path.write_bytes(b"junk")
            store.load([damaged])
        self.unknown = make.key(rows[3].id)
        self.content[self.unknown] = make.content(make.tensors(30))
        self.hot = self.journal()

    @staticmethod
    def texts_of(space: str) -> list[str]:
        return [f"Text {n} of {space}: naïve \N{SNOWMAN}. " * (1 + n % 5 * 20) + "\n" for n in range(20)]

    def seen(self) -> list[tuple[str, int, int, int, int]]:
        """What tells that a file outside was read, changed, moved or replaced."""
        found = []
        for path in sorted(self.outside.rglob("*")):
            stat = path.stat()
            read = 0 if path.is_dir() else stat.st_atime_ns
            found.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, read))
        return found

    def journal(self) -> bytes:
        """A hot journal of this index, as a process that was killed in a transaction left it."""
        copied = self.folder.with_name("copied.db")
        shutil.copy(self.folder / "index.db", copied)
        with closing(sqlite3.connect(copied)) as db:
            db.execute("PRAGMA cache_size=2")
            db.execute("update chunks set text = text || 'x'")
            return copied.with_name("copied.db-journal").read_bytes()


# Damage: each function changes the index in a folder


def flipped(random: Random, folder: Path, _: Sample) -> None:
    content = bytearray((folder / "index.db").read_bytes())
    for _ in range(random.choice((1, 1, 8, 100))):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    (folder / "index.db").write_bytes(content)


def flipped_at_the_start(random: Random, folder: Path, _: Sample) -> None:
    """Of a page: there are its kind, and where its cells are."""
    content = bytearray((folder / "index.db").read_bytes())
    at = random.randrange(len(content) // PAGE) * PAGE + random.choice((0, 0, 100))
    content[at + random.randrange(64)] ^= 1 << random.randrange(8)
    (folder / "index.db").write_bytes(content)


def truncated(random: Random, folder: Path, _: Sample) -> None:
    content = (folder / "index.db").read_bytes()
    size = random.randrange(len(content))
    (folder / "index.db").write_bytes(content[: size // random.choice((1, PAGE)) * random.choice((1, PAGE))])


def extended(random: Random, folder: Path, _: Sample) -> None:
    with (folder / "index.db").open("ab") as file:
        file.write(random.randbytes(random.choice((7, PAGE, 3 * PAGE))))


def pages_changed(random: Random, folder: Path, _: Sample) -> None:
    """Pages that are zero, noise, or another page."""
    content = bytearray((folder / "index.db").read_bytes())
    for _ in range(random.choice((1, 1, 3))):
        one, other = (random.randrange(len(content) // PAGE) * PAGE for _ in range(2))
        page = random.choice((bytes(PAGE), random.randbytes(PAGE), bytes(content[other : other + PAGE])))
        content[one : one + PAGE] = page
    (folder / "index.db").write_bytes(content)


HOSTILE: list[Any] = [
    *(None, 0, -1, 1, 2**31, 2**63 - 1, -(2**63), 1.5, float("inf"), b"", b"\xff\xfe", "", "\0", "x" * 100_000),
    *("[" * 5000, "{}", "[]", "null", "NaN", "[1]", '{"level":1}', '"x"', "0" * 32, "z" * 32, "1e999"),
]


def foreign_rows(random: Random, folder: Path, sample: Sample) -> None:
    """Values in any column: paths, other types, other rows' values. STRICT keeps nobody from that who can write to the
    file."""
    paths = [str(each) for each in sample.canaries] + [f"../outside/{each.name}" for each in sample.canaries]
    with closing(sqlite3.connect(folder / "index.db")) as db:
        written = db.execute(
            "select sql, name from sqlite_schema where type = 'table' and sql like '%STRICT%'"
        ).fetchall()
    with_schema(folder, [(sql.replace("STRICT", "").replace("NOT NULL", ""), name) for sql, name in written])
    with closing(sqlite3.connect(folder / "index.db")) as db:
        for _ in range(random.choice((1, 2, 5))):
            table = random.choice([name for _, name in written])
            column = random.choice([row[1] for row in db.execute(f"pragma table_info({table})")])
            value = random.choice([*HOSTILE, *paths, *(sample.unknown.digest, sample.keys[0].digest)])
            if random.random() < 0.2:
                (value,) = db.execute(f"select {column} from {table} order by random() limit 1").fetchone() or [None]
            where = random.choice(("", "", " where rowid % 3 = 0"))
            with suppress(sqlite3.Error):  # unique, or not null
                db.execute(f"update or replace {table} set {column} = ?{where}", [value])
        db.commit()
    with_schema(folder, written)


def with_schema(folder: Path, tables: list[tuple[str, str]]) -> None:
    """Write other statements that made the tables than made them."""
    with closing(sqlite3.connect(folder / "index.db")) as db:
        db.execute("PRAGMA writable_schema=ON")
        db.executemany("update sqlite_schema set sql = ? where name = ?", tables)
        db.commit()


def foreign_schema(random: Random, folder: Path, sample: Sample) -> None:
    outside = sample.canaries[2]
    with closing(sqlite3.connect(folder / "index.db")) as db:
        statement = random.choice(
            [
                "create trigger t after insert on chunks begin delete from entries; end",
                "create trigger t after update on memory begin delete from chunks; end",
                "create view v as select * from chunks",
                "alter table entries add column more text",
                "alter table entries drop column file",
                "drop table names",
                "drop index idx_chunks_id",
                "create table more (x)",
                f'create table "{outside}" (x)',
                "insert into _sqlite_migrations (migration_set, name, applied_at) values ('braidsdk-store', 'm9', '')",
                "delete from _sqlite_migrations",
                "PRAGMA journal_mode=WAL",
                "PRAGMA user_version=7",
                "PRAGMA encoding='UTF-16'",
                "PRAGMA application_id=7",
            ]
        )
        with suppress(sqlite3.Error):
            db.execute(statement)
        db.commit()


def hot_journal(random: Random, folder: Path, sample: Sample) -> None:
    """A journal that is whole, cut, changed, of another index, or forged."""
    journal = bytearray(sample.hot)
    match random.randrange(6):
        case 0:
            pass
        case 1:
            journal = journal[: random.randrange(len(journal))]
        case 2:
            for _ in range(random.choice((1, 20))):
                journal[random.randrange(len(journal))] ^= 1 << random.randrange(8)
        case 3:
            journal = bytearray(random.randbytes(3 * PAGE))
        case 4:
            journal = forged_journal(random, folder)
        case 5:
            named = str(random.choice(sample.canaries)).encode()
            journal = forged_journal(random, folder)
            journal += struct.pack(">I", 2**30 // PAGE + 1) + named + struct.pack(">II", len(named), sum(named)) + MAGIC
    (folder / "index.db-journal").write_bytes(journal)
    if random.random() < 0.3:
        flipped(random, folder, sample)


def forged_journal(random: Random, folder: Path) -> bytearray:
    """Right checksums over pages that never were, and a size that never was."""
    index, nonce = (folder / "index.db").read_bytes(), random.getrandbits(32)
    pages = random.choice((len(index) // PAGE, 1, 2, 1000, 2**31))
    count = random.choice((1, 2, 2, 0xFFFFFFFF))
    made = bytearray((MAGIC + struct.pack(">IIIII", count, nonce, pages, 512, PAGE)).ljust(512, b"\0"))
    for _ in range(2):
        number = random.choice((1, 2, random.randint(1, 30), 2**31 - 1))
        page = random.choice((bytes(PAGE), random.randbytes(PAGE), index[:PAGE]))
        checksum = (nonce + sum(page[at] for at in range(PAGE - 200, 0, -200))) & 0xFFFFFFFF
        made += struct.pack(">I", number) + page + struct.pack(">I", checksum)
    return made


def no_file(random: Random, folder: Path, sample: Sample) -> None:
    """Something else in the place of the index or its journal."""
    path = folder / random.choice(("index.db", "index.db-journal"))
    path.unlink(missing_ok=True)
    match random.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            path.write_bytes(random.randbytes(random.choice((0, 10, 5000))))
        case 2:
            path.write_bytes((sample.folder / "index.db").read_bytes()[: PAGE * 3])
        case 3:
            path.symlink_to(random.choice(sample.canaries))


def another_log(random: Random, folder: Path, sample: Sample) -> None:
    """A write-ahead log, as this store never has."""
    content = random.choice((sample.hot, random.randbytes(5000), struct.pack(">IIII", 0x377F0682, 3007000, PAGE, 0)))
    (folder / "index.db-wal").write_bytes(content)
    if random.random() < 0.5:
        index = bytearray((folder / "index.db").read_bytes())
        index[18:20] = b"\2\2"
        (folder / "index.db").write_bytes(index)


DAMAGES = [flipped, flipped_at_the_start, truncated, extended, pages_changed, foreign_rows, foreign_schema]
DAMAGES += [hot_journal, no_file, another_log]


# What is asked of a damaged store


class WrongError(Exception):
    """A call gave an answer that is not right."""


def hold(right: bool, what: str) -> None:
    if not right:
        raise WrongError(what)


class Questions:
    """Everything that a store is asked, and whether the answers are right."""

    def __init__(self, store: ChunkStore, sample: Sample) -> None:
        self.store, self.sample = store, sample

    def entries(self) -> None:
        keys = [*self.sample.content]
        for entry in self.store.load(keys):
            if entry is not None:
                hold(self.sample.make.content(entry.tensors) == self.sample.content[entry.key], "another entry")
                hold(entry.nbytes == sum(each.nbytes for each in entry.tensors.values()), "another size")
        hold(all(hit is None or inside(hit.path, self.store.path) for hit in self.store.look_up(keys)), "a path")
        self.store.explain(keys)

    def chunks(self) -> None:
        for space in NAMESPACES:
            ids = [each for each, text in self.sample.texts.items() if text in self.sample.texts_of(space)]
            found = [*self.store.list_chunks(space), *self.store.find_chunks(space, ids).values()]
            found += self.store.find_named(space, [f"name {n}" for n in range(5)]).values()
            found += self.store.list_chunks(space, name="name*", metadata={"n": 1}, level=1, after=ids[0])
            for row in found:
                hold(row.namespace == space and self.sample.texts.get(row.id) == row.text, "another text")
            self.store.known_chunks(space, ids)

    def names(self) -> None:
        for call in (self.store.chunk_ids, self.store.count_chunks, self.store.stats):
            call("default")
        self.store.close_names("default", "nam 1")

    def records(self) -> None:
        self.store.entries_of("default", next(iter(self.sample.texts)))
        self.store.namespaces()
        _ = self.store.damaged_count

    def memory(self) -> None:
        self.store.recall(["a", *counters("default")])
        self.store.recall_all("")
        self.store.remember({"a": "c"}, add={counters("default")[0]: 1})

    def itself(self) -> None:
        self.store.check(1.0)

    def registering(self) -> None:
        row = self.store.add_chunk(namespace="default", level=1, text="new\n", name="new", metadata={"x": 1})
        hold(row.text == "new\n", "another text")
        self.store.update_chunk("default", row.id, metadata={"x": 2}, name="newer")
        self.store.delete_chunk("default", row.id)

    def publishing(self) -> None:
        self.store.publish([(self.sample.unknown, self.sample.make.tensors(30), {})])

    def deleting(self) -> None:
        for text in self.sample.texts_of("default")[2::3]:
            self.store.delete_chunk("default", chunk_id("default", 1, text))

    ALL = (entries, chunks, names, records, memory, itself, registering, publishing, entries, deleting, entries, chunks)


def inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def ask(folder: Path, sample: Sample, random: Random) -> tuple[int, list[str]]:
    """Ask a damaged store everything. Returns how many typed errors there were, and what was wrong."""
    typed, wrong = 0, []
    for _ in range(2):
        try:
            with ChunkStore(folder) as store:
                questions = list(Questions.ALL)
                random.shuffle(questions)
                for question in questions:
                    try:
                        question(Questions(store, sample))
                    except BraidError:
                        typed += 1
                    except Exception as error:  # whatever it is, it is what this looks for
                        wrong.append(f"{question.__name__}: {type(error).__name__}: {error}")
        except BraidError:
            typed += 1
        except Exception as error:
            wrong.append(f"open: {type(error).__name__}: {error}")
    return typed, wrong


def lost(folder: Path, sample: Sample) -> list[str]:
    """What a repaired store does not give back, of the sound entries that are in their places with their chunks."""
    before = {
        key
        for key in sample.content
        if is_sound(folder / "entries" / key.digest[:2] / f"{key.digest}.safetensors")
        and all((folder / "chunks" / each[:2] / f"{each}.json").exists() for each in key.chunk_ids())
    }
    try:
        repair(folder)
    except StoreVersionError:  # a later version may have written it: it is not ours to repair
        (folder / "index.db").unlink()
    with ChunkStore(folder) as store:
        found = {each.key: sample.make.content(each.tensors) for each in store.load([*before]) if each}
    return [f"{key.digest} is lost" for key in before if found.get(key) != sample.content[key]]


def is_sound(path: Path) -> bool:
    try:
        blobs.read(path)
    except (blobs.DamagedFile, OSError):
        return False
    return True


def damage(tmp_path: Path, make: Any, count: int) -> tuple[list[str], list[str], int]:
    """Damage an index `count` times. Returns what was wrong, what was lost, and how many typed errors there were."""
    sample, folder = Sample(tmp_path, make), tmp_path / "store"
    wrong: list[str] = []
    missing: list[str] = []
    errors = 0
    for number in range(count):
        random = Random(number)
        kind = DAMAGES[number % len(DAMAGES)]
        shutil.copytree(sample.folder, folder)
        kind(random, folder, sample)
        asked = number // len(DAMAGES) % 2 == 0
        if asked:
            typed, found = ask(folder, sample, random)
            errors += typed
            wrong += [f"{kind.__name__} {number}: {each}" for each in found]
        try:
            missing += [f"{kind.__name__} {number}: {each}" for each in lost(folder, sample)]
        except Exception as error:  # whatever it is, it is what this looks for
            missing.append(f"{kind.__name__} {number}: {type(error).__name__}: {error}")
        if sample.seen() != sample.there:
            wrong.append(f"{kind.__name__} {number}: outside: {set(sample.seen()) ^ set(sample.there)}")
            sample.there = sample.seen()
        shutil.rmtree(folder)
    assert all(each.read_text() == "mine" for each in sample.canaries)
    return wrong, missing, errors


def test_a_damaged_index_gives_right_answers_or_typed_errors(tmp_path: Path, make: Any) -> None:
    wrong, missing, errors = damage(tmp_path, make, 60)
    assert (wrong, missing) == ([], [])
    assert errors > 25, "most damage must be noticed"


@pytest.mark.campaign
def test_a_damaged_index_of_very_many_gives_right_answers_or_typed_errors(
    tmp_path: Path, make: Any, counted: Callable[..., None]
) -> None:
    wrong, missing, _ = damage(tmp_path, make, 5_000)
    counted("the index or its journal damaged or forged, and repaired", 5_000, wrong=len(missing))
    counted("of these, everything asked of the store before", 2_500, wrong=len(wrong))
    assert (wrong, missing) == ([], [])
