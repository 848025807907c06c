"""One fault at every single step of what a store does, in a process of its own; then what is left is checked.

    LD_PRELOAD=faults.so python steps.py [--every N] [--kinds kill eio enospc lock]

A process opens a store that holds something, and registers, publishes, loads, updates and deletes. One of its calls to
the system fails, or kills it. It says what was acknowledged as it goes. Then this process opens the store and checks:
what was acknowledged is there; what was not is absent or whole; nothing that is read is wrong; the index is sound;
nothing is left that opening does not collect; and every error was one of ours, after which the same process could go
on. Of the kills, opening the store again is killed at every step as well. The counts go to stdout as JSON.
"""

import argparse
import ctypes
import errno
import gc
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import content, make_key, make_tensors
from planted import PLANTED
from processes import containing, forked, left_over

from braidsdk.errors import BraidError, StoreError
from braidsdk.store import ChunkStore, Entry, EntryKey, collect

ANY, WRITES, LOCKS = 4, 1, 2
KINDS = {
    "kill": (-1, ANY),
    "eio": (errno.EIO, ANY),
    "enospc": (errno.ENOSPC, WRITES),
    "lock": (errno.ENOLCK, LOCKS),
    "eintr": (errno.EINTR, LOCKS),
}
FAULTS = ctypes.CDLL(None)
FAULTS.faults_last.restype = ctypes.c_char_p
KEPT, DELETED, NEW, LATER = "What is kept.\n", "What is deleted: marmalade.\n", "What is new.\n", "What comes later.\n"


def key_of(opened: ChunkStore, name: str) -> EntryKey | None:
    row = opened.find_chunk("default", name)
    return make_key(row.id, tokens=tuple(range(1, 2 + len(name)))) if row else None


def add(opened: ChunkStore, name: str, text: str) -> None:
    opened.add_chunk(namespace="default", level=1, text=text, name=name)


def publish(opened: ChunkStore, name: str) -> None:
    key = key_of(opened, name)
    if key:
        opened.publish([(key, make_tensors(len(name)), {"name": name})])


def load(opened: ChunkStore, name: str) -> bool:
    """Whether an entry is there; if so it must be right."""
    key = key_of(opened, name)
    (entry,) = opened.load([key]) if key else [None]
    if entry is None:
        return False
    if not isinstance(entry, Entry) or content(entry.tensors) != content(make_tensors(len(name))):
        raise AssertionError(f"the entry of {name} is wrong")
    return True


STEPS: dict[str, Callable[[ChunkStore], object]] = {
    "add new": lambda opened: add(opened, "new", NEW),
    "publish new": lambda opened: publish(opened, "new"),
    "load kept": lambda opened: load(opened, "kept"),
    "update kept": lambda opened: opened.update_chunk(
        "default",
        opened.find_chunk("default", "kept").id,
        metadata={"v": 2},  # type: ignore[union-attr]
    ),
    "delete": lambda opened: opened.delete_chunks("default", [make_id(opened)]),
    "add later": lambda opened: add(opened, "later", LATER),
    "publish later": lambda opened: publish(opened, "later"),
}


def make_id(opened: ChunkStore) -> str:
    row = opened.find_chunk("default", "deleted")
    return row.id if row else "0" * 32


def prepared(folder: Path) -> None:
    with ChunkStore(folder) as opened:
        for name, text in (("kept", KEPT), ("deleted", DELETED)):
            add(opened, name, text)
            publish(opened, name)


def work(folder: Path, say: Callable[[str], object]) -> None:
    """Everything, with what was acknowledged and which errors came. After an error it goes on."""
    for attempt in range(2):
        try:
            opened = ChunkStore(folder)
        except StoreError as error:
            say(f"error open {type(error).__name__}: {error}")
            if attempt:
                return
        else:
            break
    for name, step in STEPS.items():
        try:
            step(opened)
        except BraidError as error:
            say(f"error {name} {type(error).__name__}: {error}")
        else:
            say(f"done {name}")
    opened.close()


def check(folder: Path, said: list[str]) -> list[str]:
    """What is wrong with what is left, with the index and without it."""
    done = {line[5:] for line in said if line.startswith("done ")}
    wrong = check_opened(folder, done)
    (folder / "index.db").unlink()
    return wrong + [f"rebuilt: {each}" for each in check_opened(folder, done)]


def check_opened(folder: Path, done: set[str]) -> list[str]:
    """What is wrong with what a process finds that opens the store."""
    wrong: list[str] = []
    with ChunkStore(folder) as opened:
        there = {name: opened.find_chunk("default", name) for name in ("kept", "deleted", "new", "later")}
        whole = {name: load(opened, name) for name in there}
        for name in ("new", "later"):
            if f"add {name}" in done and not there[name]:
                wrong.append(f"lost chunk {name}")
            if f"publish {name}" in done and f"add {name}" in done and not whole[name]:
                wrong.append(f"lost entry {name}")
        if not (there["kept"] and whole["kept"]):
            wrong.append("lost kept")
        if "update kept" in done and there["kept"] and there["kept"].metadata != {"v": 2}:
            wrong.append("lost metadata")
        if "delete" in done and (there["deleted"] or whole["deleted"]):
            wrong.append("deleted came back")
        found = opened.check(1.0)
        if not found.is_sound or found.stray:
            wrong.append(f"check: {found}")
        if opened.damaged_count:
            wrong.append("set something aside")
    wrong += left_over(folder)
    if "delete" in done:
        wrong += [f"deleted text in {path.name}" for path in containing(folder, b"marmalade")]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th step")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--planted", choices=list(PLANTED), help="a bug, to see that it is noticed")
    options = parser.parse_args()
    collect.SWEEP_EVERY_S = 0.0
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, origin = Path(scratch, "store"), Path(scratch, "origin")
        prepared(origin)

        def fresh() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(origin, folder)

        def faulty(at: int, kind: str, run: Callable[..., object], say: Callable[[str], object]) -> None:
            FAULTS.faults_arm(str(folder).encode(), ctypes.c_long(at), *KINDS[kind])
            run(folder, say)
            say(f"count {FAULTS.faults_count()} {FAULTS.faults_last().decode()}")

        def opening(where: Path, _: Callable[[str], object]) -> None:
            ChunkStore(where).close()

        def judge(label: str, said: list[str]) -> None:
            found = [line for line in said if line.startswith("raw ")]
            try:
                found += check(folder, said)
            except Exception as error:
                found.append(f"check: {type(error).__name__}: {error}")
            wrong.extend(f"{label}: {each}" for each in found)

        def steps_of(kind: str, run: Callable[..., object]) -> int:
            said, _ = forked(lambda say: faulty(0, kind, run, say))
            return int(said[-1].split()[1])

        if options.planted:
            PLANTED[options.planted]()
        for kind in options.kinds:
            fresh()
            for at in range(1, steps_of(kind, work) + 1, options.every):
                fresh()
                said, code = forked(lambda say, at=at, kind=kind: faulty(at, kind, work, say))
                counts[kind] += 1
                last = next((line.split()[-1] for line in said if line.startswith("count ")), "")
                label = f"{kind} at {at} {last}"
                errors = [line for line in said if line.startswith("error ")]
                counts[f"{kind}, errors"] += len(errors)
                if len(errors) > 1:
                    wrong.append(f"{label}: more than one call failed: {errors}")
                wrong += [f"{label}: {line}" for line in errors if "StoreCorruptError" in line]
                if kind == "kill" and code == -signal.SIGKILL and not options.planted:
                    saved = Path(scratch, "saved")
                    shutil.rmtree(saved, ignore_errors=True)
                    shutil.copytree(folder, saved)
                    again = steps_of(kind, opening)
                    for second in range(1, again + 1, max(options.every, again // 4)):
                        shutil.rmtree(folder)
                        shutil.copytree(saved, folder)
                        forked(lambda say, second=second: faulty(second, "kill", opening, say))
                        counts["kill, then kill the recovery"] += 1
                        judge(f"{label}, then at {second}", said)
                    shutil.rmtree(folder)
                    shutil.copytree(saved, folder)
                judge(label, said)
                gc.collect()
    sys.stdout.write(json.dumps({"counts": dict(counts), "wrong": wrong}, indent=1) + "\n")


if __name__ == "__main__":
    main()
