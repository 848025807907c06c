"""A disk without room: what is stored stays readable, errors are typed, and the process goes on once there is room.

The disk is a small tmpfs, filled to leave so many bytes. A part runs always, all of it by `pytest -m campaign`.
"""

import resource
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braidsdk.errors import StoreError, StoreFullError
from braidsdk.store import Array, ChunkStore, EntryKey, sha256_of_tokens

DISK_BYTES = 8 << 20
STEP_BYTES = 64 << 10
ENTRY_BYTES = 300_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs to mount a tmpfs: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def filled(disk: Path, free: int) -> Iterator[None]:
    """Leave so many bytes free, as far as there are."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        try:
            while file.write(bytes(1 << 16)):
                file.flush()
        except OSError:
            pass
    size = ballast.stat().st_size
    with ballast.open("r+b") as file:
        file.truncate(max(size - free, 0))
    try:
        yield
    finally:
        ballast.unlink()


def tensors(number: int) -> dict[str, Array]:
    data = np.random.default_rng(number).integers(0, 256, ENTRY_BYTES, dtype=np.uint8).data
    return {"layer.000": Array("int8", (ENTRY_BYTES,), [data])}


class Use:
    """What a process does with a store, and what it was told is there."""

    def __init__(self, folder: Path, make: Any, full: type[StoreError] = StoreFullError) -> None:
        self.full = full  # what a call raises where there is no room
        self.make, self.store = make, ChunkStore(folder)
        self.texts: dict[str, str] = {}
        self.entries: dict[int, EntryKey] = {}
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """What a call gives; None if it says that there is no room."""
        try:
            result = call()
        except self.full:
            self.outcomes["full"] += 1
            return None
        except Exception as error:  # whatever it is, it is what this looks for
            self.wrong.append(f"{what}: {type(error).__name__}: {error}")
            return None
        self.outcomes["done"] += 1
        return result if result is not None else True

    def write(self, number: int) -> None:
        """Register a text, name it, publish an entry."""
        text = f"text {number} " * 50 + "\n"
        row = self.attempt("add", lambda: self.store.add_chunk(namespace="default", level=1, text=text))
        if row is None:
            return
        self.texts[row.id] = text
        self.attempt("update", lambda: self.store.update_chunk("default", row.id, name=f"name {number}"))
        self.attempt("remember", lambda: self.store.remember({f"{number}": "x" * 100}))
        key = self.make.key(row.id, after=(None,), after_sha256=sha256_of_tokens([number]))
        if self.attempt("publish", lambda: self.store.publish([(key, tensors(number), {})])):
            self.entries[number] = key

    def read(self) -> None:
        """Everything that was acknowledged is there."""
        rows = self.attempt("find", lambda: self.store.find_chunks("default", self.texts)) or {}
        if {each: row.text for each, row in rows.items()} != self.texts:
            self.wrong.append("a text is lost")
        for number, key in self.entries.items():
            (entry,) = self.attempt("load", lambda key=key: self.store.load([key])) or [None]
            if entry is None or self.make.content(entry.tensors) != self.make.content(tensors(number)):
                self.wrong.append(f"entry {number} is lost")

    def reopen(self) -> None:
        """As another process does."""
        path = self.store.path
        opened = self.attempt("open", lambda: ChunkStore(path))
        if opened is not None:
            self.store.close()
            self.store = opened

    def delete(self, number: int) -> None:
        key = self.entries.pop(number)
        self.texts.pop(str(key.chunk_id))
        if not self.attempt("delete", lambda: self.store.delete_chunk("default", str(key.chunk_id))):
            self.wrong.append("nothing was deleted")


def used_while_full(disk: Path, make: Any, free: int) -> Use:
    """Use a store before, while and after its disk has so many bytes."""
    use = Use(disk / "store", make)
    use.write(0)
    with filled(disk, free):
        for number in (1, 2):
            use.write(number)
        use.read()
        use.reopen()
        use.read()
        use.write(3)
    before = use.outcomes["full"]
    for number in (4, 5):
        use.write(number)
    use.read()
    use.delete(0)
    use.reopen()
    use.read()
    if use.outcomes["full"] > before:
        use.wrong.append("it still calls the disk full")
    if not use.store.check(1.0).is_sound or list((disk / "store" / "tmp").glob("*.part")):
        use.wrong.append("it is not sound, or something is left over")
    use.store.close()
    subprocess.run(["rm", "-rf", str(disk / "store")], check=True)
    return use


def at_all(disk: Path, make: Any, points: list[int]) -> tuple[Counter[str], list[str]]:
    outcomes, wrong = Counter[str](), []
    for free in points:
        use = used_while_full(disk, make, free)
        outcomes += use.outcomes
        wrong += [f"{free} bytes free: {each}" for each in use.wrong]
    return outcomes, wrong


def test_a_full_disk_loses_nothing_and_the_process_goes_on(disk: Path, make: Any) -> None:
    outcomes, wrong = at_all(disk, make, [0, 4096, 16384, *range(STEP_BYTES, 1 << 20, 3 * STEP_BYTES)])
    assert wrong == []
    assert outcomes["full"] > 15, "the disk was full"


@pytest.mark.campaign
def test_a_disk_that_is_full_at_any_point_loses_nothing(disk: Path, make: Any, counted: Callable[..., None]) -> None:
    points = sorted({*range(0, 4 * STEP_BYTES, 4096), *range(0, DISK_BYTES, STEP_BYTES)})
    outcomes, wrong = at_all(disk, make, points)
    counted(
        "a disk with room for so many bytes, at every 64 KiB of 8 MiB and more",
        len(points),
        wrong=len(wrong),
    )
    assert wrong == []
    assert outcomes["full"] > 100, "the disk was full"


def test_deleting_works_where_nothing_is_free(disk: Path, make: Any) -> None:
    use = Use(disk / "store", make)
    use.write(0)
    use.write(1)
    with use.store, filled(disk, 0):
        key = use.entries[0]
        assert use.store.delete_chunk("default", str(key.chunk_id)) == (key.digest,)
        use.delete(1)
        assert use.wrong == []
        assert use.store.stats("default").entries == 0


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may be written to beyond this size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def beyond_a_limit(folder: Path, make: Any, size: int) -> list[str]:
    """What is wrong once files can't grow beyond a size.

    SQLite does not say why it could not write, so a plain StoreError is all that can be said. A limit below the size
    that the index has keeps it from undoing a write, so it can't be read until the limit is gone.
    """
    use = Use(folder, make, StoreError)
    use.write(0)
    large = "x" * 100_000
    with limited(size):
        use.attempt("add", lambda: use.store.add_chunk(namespace="default", level=1, text=large))
        use.write(1)
        if size > (folder / "index.db").stat().st_size:
            use.read()
    for number in (3, 4):
        use.write(number)
    use.read()
    if size < ENTRY_BYTES and not use.outcomes["full"]:
        use.wrong.append("the limit was not met")
    if not use.store.check(1.0).is_sound:
        use.wrong.append("it is not sound")
    use.store.close()
    return [f"{size} bytes a file: {each}" for each in use.wrong]


def test_files_that_may_not_grow_lose_nothing(tmp_path: Path, make: Any) -> None:
    sizes = (0, 1000, 100_000, 200_000)
    assert [each for size in sizes for each in beyond_a_limit(tmp_path / str(size), make, size)] == []


@pytest.mark.campaign
def test_files_that_may_not_grow_beyond_any_size_lose_nothing(
    tmp_path: Path, make: Any, counted: Callable[..., None]
) -> None:
    sizes = [*range(0, 512 << 10, 8 << 10), *range(1, 5000, 500)]
    wrong = [each for size in sizes for each in beyond_a_limit(tmp_path / str(size), make, size)]
    counted("files that can't grow beyond so many bytes", len(sizes), wrong=len(wrong))
    assert wrong == []
