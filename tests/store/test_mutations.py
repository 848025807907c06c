"""Entries' files that were changed at random, or by someone who knows the format: no load returns one, none crashes,
and none takes much more memory than the file. A part runs always, all of it by `pytest -m campaign`."""

import dataclasses
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import xxhash

from braidsdk.store import Array, ChunkStore, Entry, EntryKey, Hit, NewChunk, blobs, rebuild
from braidsdk.store.blobs import DamagedFile

SLACK_BYTES = 1 << 18
"""What a load may take besides twice the file's size: Python's objects for a header of a few KB."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An entry's file that is to be changed, the file of another entry, and the helpers of conftest.py."""

    random: Random
    file: bytes
    other: bytes
    make: Any

    @property
    def start(self) -> int:
        """The first byte behind the header."""
        return 8 + int.from_bytes(self.file[:8], "little")

    def headed(self, text: str) -> bytes:
        return bytes(self.make.headed(self.file, text.encode(errors="surrogatepass")))


# At random


def flipped(c: Case) -> bytes:
    changed = bytearray(c.file)
    for _ in range(c.random.choice((1, 1, 1, 2, 8))):
        changed[c.random.randrange(len(changed))] ^= 1 << c.random.randrange(8)
    return bytes(changed)


def truncated(c: Case) -> bytes:
    return c.file[: c.random.randrange(len(c.file))]


def extended(c: Case) -> bytes:
    return c.file + c.random.choice((c.random.randbytes(40), bytes(c.random.randint(1, 4096)), c.other, c.file))


def swapped(c: Case) -> bytes:
    """Two pieces of one size change places."""
    size = min(c.random.choice((1, 8, 64, 512)), len(c.file) // 3)
    one, two = sorted(c.random.randrange(len(c.file) - size) for _ in range(2))
    if two - one < size:
        return c.file
    first, second = c.file[one : one + size], c.file[two : two + size]
    return c.file[:one] + second + c.file[one + size : two] + first + c.file[two + size :]


def moved(c: Case) -> bytes:
    begin = c.random.randrange(len(c.file))
    end = min(begin + c.random.randint(1, 256), len(c.file))
    rest = c.file[:begin] + c.file[end:]
    to = c.random.randint(0, len(rest))
    return rest[:to] + c.file[begin:end] + rest[to:]


def overwritten(c: Case) -> bytes:
    begin, size = c.random.randrange(len(c.file)), c.random.randint(1, 512)
    piece = c.random.choice((bytes(size), b"\xff" * size, c.random.randbytes(size)))
    return (c.file[:begin] + piece + c.file[begin + size :])[: len(c.file)]


def junk(c: Case) -> bytes:
    noise = c.random.randbytes(c.random.randrange(len(c.file)))
    return c.random.choice((b"", len(noise).to_bytes(8, "little"), c.file[: blobs._DIGEST.stop])) + noise


def of_another(c: Case) -> bytes:
    """All or a part of another entry's file."""
    at = c.random.choice((0, c.start, c.random.randrange(len(c.file))))
    return c.file[:at] + c.other[c.random.choice((at, 8 + int.from_bytes(c.other[:8], "little"))) :]


def of_another_length(c: Case) -> bytes:
    """The first bytes, which say where the header ends."""
    length, size = c.start - 8, len(c.file)
    lies = (0, 1, length - 1, length + 1, size, size - 8, 2**31, 2**40, 2**63, 2**64 - 1, c.random.getrandbits(64))
    return c.random.choice(lies).to_bytes(8, "little") + c.file[8:]


# By someone who knows the format: the digests are right

HOLE = "\1hole"
RAW = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "9" * 5000, "-1", "0x10", "tru", "", "[[]", '{"x":1,"x":2}'),
    *(r'"\ud800"', r'"\u0000"', '"\ud800"', "[" * 3000, "[" * 900 + "]" * 900, "[" * 3000 + "]" * 3000, '{"a":' * 3000),
]
"""Texts in the place of a value that are not all JSON."""

VALUES: list[Any] = [
    *(
        0,
        1,
        -1,
        2**31,
        2**32,
        2**63,
        2**64,
        10**300,
        1.5,
        True,
        False,
        None,
        "",
        "x",
        "7",
        "\ud800",
        "NaN",
        HOLE,
        [],
        {},
        [0],
    ),
    *([0, 2**63], [-8, 8], [2**62, 2**62], {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "F64", "BF16"),
]


def edit(random: Random, tree: Any) -> None:
    """Change something somewhere in a tree of JSON."""
    containers = [tree]
    for each in containers:
        inner = [*each.values()] if isinstance(each, dict) else each
        containers += [one for one in inner if isinstance(one, dict | list) and one]
    where, value = random.choice(containers), random.choice([*VALUES, *containers])
    at = random.choice([*where] if isinstance(where, dict) else range(len(where)))
    value = json.loads(json.dumps(value))  # so that the tree stays one
    match random.randrange(5):
        case 0:
            del where[at]
        case 1 if isinstance(where, dict):
            where[random.choice(("", "x", "layer.001", "token_ids", *where))] = where.pop(at)
        case 2 if isinstance(where, list):
            where.insert(at, value)
        case 3 if isinstance(where[at], int):
            where[at] += random.choice((-8, -1, 1, 8, 2**32))
        case _:
            where[at] = value


def dumped(random: Random, tree: Any) -> str:
    return json.dumps(tree, separators=(",", ":")).replace(json.dumps(HOLE), random.choice(RAW))


def lies_of_tensors(c: Case) -> bytes:
    header = c.make.header_of(c.file)
    metadata = header.pop("__metadata__")
    for _ in range(c.random.choice((1, 1, 2, 3))):
        if header:
            edit(c.random, header)
    return c.headed(dumped(c.random, {"__metadata__": metadata, **header}))


def lies_of_the_entry(c: Case) -> bytes:
    """About its key, its chunk, its provenance, and so on."""
    header = c.make.header_of(c.file)
    metadata = header["__metadata__"]
    name = c.random.choice([*metadata][1:])
    if name in ("key", "chunk", "provenance") and c.random.random() < 0.8:
        inner = [json.loads(metadata[name])]
        edit(c.random, inner)
        metadata[name] = dumped(c.random, inner)[1:-1]
    else:
        metadata[name] = c.random.choice(VALUES)
    return c.headed(dumped(c.random, header))


def doubled(c: Case) -> bytes:
    """A member is there twice, and says something else the second time."""
    header = c.make.header_of(c.file)
    text = json.dumps(header, separators=(",", ":"))
    name = c.random.choice([*header])
    edit(c.random, header[name])
    return c.headed(f"{text[:-1]},{json.dumps(name)}:{dumped(c.random, header[name])}}}")


def refreshed(c: Case) -> bytes:
    """Other tensors, with both digests."""
    body = c.random.choice((flipped, swapped, overwritten))(dataclasses.replace(c, file=c.file[c.start :]))
    header = c.make.header_of(c.file)
    header["__metadata__"]["payload"] = xxhash.xxh3_128_hexdigest(body)
    return bytes(c.make.headed(c.file[: c.start] + body, json.dumps(header, separators=(",", ":")).encode()))


AT_RANDOM = [flipped, truncated, extended, swapped, moved, overwritten, junk, of_another, of_another_length]
FORGED = [lies_of_tensors, lies_of_the_entry, doubled, refreshed]


class Files:
    """Sound entries of a store, and what becomes of a load when one's file is changed."""

    def __init__(self, store: ChunkStore, make: Any, tensors: Sequence[Any]) -> None:
        rows = store.add_chunks(
            [NewChunk("default", 1, f"Text {n}: naïve \N{SNOWMAN}.\n") for n in range(len(tensors))]
        )
        self.store, self.make = store, make
        self.keys: list[EntryKey] = [make.key(row.id, after=(None,)) for row in rows]
        self.tensors = list(tensors)
        store.publish([(key, each, {"torch": "2.13"}) for key, each in zip(self.keys, tensors, strict=True)])
        self.hits: list[Hit] = [hit for hit in store.look_up(self.keys) if hit]
        self.sound = [hit.path.read_bytes() for hit in self.hits]

    def changed(self, random: Random, mutation: Callable[[Case], bytes]) -> tuple[int, bytes]:
        """The number of an entry, and its file with a change."""
        at = random.randrange(len(self.sound))
        return at, mutation(Case(random, self.sound[at], self.sound[at - 1], self.make))

    def wrong(self, at: int, content: bytes, *, forged: bool) -> str | None:
        """What is wrong with how the store takes an entry's changed file; None if nothing is."""
        key, hit = self.keys[at], self.hits[at]
        hit.path.write_bytes(content)
        try:
            entry = self.store._load(key, hit, None)
            if (entry is not None) != (content == self.sound[at]):
                return "it was served" if entry else "it was not served, and is the sound one"
            if forged and len(content) >= blobs._DIGEST.stop:
                # As if the index were forged too, or rebuilt from the file.
                named = content[blobs._DIGEST].decode(errors="replace")
                self.store._load(key, dataclasses.replace(hit, payload_digest=named), None)
                with suppress(DamagedFile):
                    rebuild.row_of(hit.path, blobs.read_header(hit.path), key.digest)
        except Exception as error:  # whatever it is, it is what this looks for
            return f"{type(error).__name__}: {error}"
        return None

    def wrong_in_public(self, at: int, content: bytes) -> str | None:
        """The same by public calls: the file is set aside with its reason, and the entry is computed again."""
        key = self.keys[at]
        self.hits[at].path.write_bytes(content)
        (entry,) = self.store.load([key])
        if (entry is not None) != (content == self.sound[at]):
            return "it was served" if entry else "it was not served, and is the sound one"
        if entry is None:
            if self.store.explain([key])[0].reason != "damaged" or self.hits[at].path.exists():
                return "it was not set aside"
            self.store.publish([(key, self.tensors[at], {"torch": "2.13"})])
            self.hits[at] = self.store.look_up([key])[0] or pytest.fail("it was not published")
            self.sound[at] = self.hits[at].path.read_bytes()
        return None


@pytest.fixture
def files(store: ChunkStore, make: Any) -> Files:
    return Files(store, make, [make.tensors(1), make.tensors(2, "int8"), make.tensors(3, "float32")])


def mutate(files: Files, count: int, monkeypatch: pytest.MonkeyPatch, *, public_every: int) -> list[str]:
    """Change files `count` times, and say what went wrong.

    Most changes go through `ChunkStore._load`, which all loads go through, without moving the file afterwards. Some go
    through public calls.
    """
    random = Random(5)
    wrong: list[str] = []
    done: Counter[bool] = Counter()
    for number in range(count):
        mutation = random.choice([*AT_RANDOM, *FORGED])
        at, content = files.changed(random, mutation)
        if number % public_every == 0:
            found = files.wrong_in_public(at, content)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(files.store, "_set_aside", lambda *_: None)
                found = files.wrong(at, content, forged=mutation in FORGED)
        done[content == files.sound[at]] += 1
        if found:
            wrong.append(f"{mutation.__name__} {number}: {found}")
    assert done[False] > 0.9 * count, "most must change something"
    return wrong


def test_no_changed_file_is_served_or_crashes(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mutate(files, 6000, monkeypatch, public_every=100) == []


@pytest.mark.campaign
def test_no_changed_file_of_very_many_is_served_or_crashes(
    files: Files, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    wrong = mutate(files, 200_000, monkeypatch, public_every=100)
    counted("an entry's file changed, at random or with right digests", 200_000, wrong=len(wrong))
    assert wrong == []


def peak(work: Callable[[], object]) -> int:
    """The most bytes that Python and numpy hold at a time while something is done, besides what they held before.

    They allocate all that reading a file takes. Unlike the process's peak, it can be measured for each file.
    """
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def large(size: int) -> dict[str, Array]:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).data
    return {f"layer.{n:03d}": Array("int8", (1 << 20,), [data[n << 20 : (n + 1) << 20]]) for n in range(size >> 20)}


def bloated(c: Case) -> bytes:
    """Most of the file is a header that takes much more memory when it is parsed. Its digest is right."""
    header = json.dumps(c.make.header_of(c.file), separators=(",", ":"))
    return c.headed(f'{header[:-1]},"x":[{"{}," * (len(c.file) // 3)}0]}}')


def long_header(c: Case) -> bytes:
    """All of the file is a header, by its first bytes. Its digest is wrong."""
    return (len(c.file) - 8).to_bytes(8, "little") + c.file[8:]


def at_the_limit(c: Case) -> bytes:
    """The header has the size that is just allowed, by the file's first bytes."""
    return blobs.HEADER_LIMIT_BYTES.to_bytes(8, "little") + c.file[8:]


def greedy(files: Files, rounds: int) -> tuple[int, list[str]]:
    """How many changed files were read, and which of them took too much memory."""
    random, wrong, count = Random(6), [], 0
    kinds: list[Callable[[Case], bytes]] = [*AT_RANDOM, *FORGED, bloated, long_header, at_the_limit]
    for mutation in [lambda c: c.file, *(each for each in kinds for _ in range(rounds))]:
        at, content = files.changed(random, mutation)
        files.hits[at].path.write_bytes(content)
        took = peak(partial(files.store._load, files.keys[at], files.hits[at], None))
        count += 1
        if took > 2 * len(content) + SLACK_BYTES:
            wrong.append(f"{mutation.__name__} took {took:,} for {len(content):,} bytes")
    return count, wrong


@pytest.fixture
def large_files(store: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch) -> Files:
    made = Files(store, make, [large(4 << 20), large(7 << 20)])
    monkeypatch.setattr(store, "_set_aside", lambda *_: None)
    return made


def test_a_changed_file_takes_at_most_twice_its_size_in_memory(large_files: Files) -> None:
    assert greedy(large_files, 2)[1] == []


@pytest.mark.campaign
def test_many_changed_files_take_at_most_twice_their_size_in_memory(
    large_files: Files, counted: Callable[..., None]
) -> None:
    count, wrong = greedy(large_files, 60)
    counted("memory of a load of a changed file, against twice the file", count, wrong=len(wrong))
    assert wrong == []


# Names that fit


def named(folder: Path, content: bytes) -> None:
    """Put a file where an entry with its key would be, if its header says one."""
    digest = "0" * 32
    path = folder / "entries" / "00" / f"{digest}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        header = blobs.read_header(path)
    except DamagedFile:
        return
    digest = rebuild.digest_of(rebuild.canonical_json(header.key), blobs.read_token_bytes(path, header))
    place = folder / "entries" / digest[:2] / f"{digest}.safetensors"
    place.parent.mkdir(exist_ok=True)
    path.rename(place)


def rebuilt(folder: Path, make: Any, count: int) -> list[str]:
    """Rebuild an index over two sound entries and forged ones, and say what went wrong."""
    random, wrong = Random(7), []
    for number in range(count):
        with ChunkStore(folder / str(number)) as store:
            files = Files(store, make, [make.tensors(n) for n in range(3)])
        (folder / str(number) / "index.db").unlink()
        for _ in range(8):
            case = Case(random, files.sound[2], files.sound[0], make)
            named(folder / str(number), random.choice((lies_of_the_entry, doubled))(case))
        try:
            with ChunkStore(folder / str(number)) as store:
                if not all(isinstance(each, Entry) for each in store.load(files.keys[:2])):
                    wrong.append(f"{number}: a sound entry is lost")
                store.list_chunks("default")
                store.explain(files.keys)
        except Exception as error:  # whatever it is, it is what this looks for
            wrong.append(f"{number}: {type(error).__name__}: {error}")
    return wrong


def test_no_forged_file_keeps_the_index_from_being_rebuilt(tmp_path: Path, make: Any) -> None:
    assert rebuilt(tmp_path, make, 60) == []


@pytest.mark.campaign
def test_no_forged_file_of_many_keeps_the_index_from_being_rebuilt(
    tmp_path: Path, make: Any, counted: Callable[..., None]
) -> None:
    wrong = rebuilt(tmp_path, make, 500)
    counted("eight forged files beside sound ones, and the index is rebuilt", 500, wrong=len(wrong))
    assert wrong == []
