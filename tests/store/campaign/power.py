"""Power cuts: random work on a store is recorded, and what a cut may leave at any moment of it is opened and checked.

    LD_PRELOAD=recorder.so python power.py --workloads 50 --states 40 [--planted no-file-sync]

Each workload is done by some processes, one after the other, of which some are killed. What a cut leaves is made from
the record (`disk.py`). It must hold what was acknowledged, and of what was under way all or nothing; the index must be
sound; no text whose deletion was acknowledged may be found in any file; what nothing names must be gone after a sweep;
a bit that turns over must be noticed; and the store must take what is written next. Prints JSON.
"""

import argparse
import ctypes
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from disk import KINDS, Disk, Record, content_of, read_log
from planted import PLANTED
from processes import containing, entry_files, forked, left_over
from workload import steps, universe

from braidsdk.store import ChunkStore, collect

RECORDER = ctypes.CDLL(None)
EVERYTHING = universe()
SWEEP_EVERY_S = collect.SWEEP_EVERY_S
STORE = Path("parent", "store")
"""Where the store is in the folder that is watched: its parent is made with it."""


def work(top: Path, log: Path, seed: str, kill_at: int) -> None:
    """One process of a workload: it opens the store, says what is there, and does some steps."""
    RECORDER.recorder_begin(str(top).encode(), str(log).encode(), ctypes.c_long(kill_at))
    say = lambda line: RECORDER.recorder_say(line.encode())  # noqa: E731
    chance = random.Random(seed)
    with ChunkStore(top / STORE) as opened:
        found = model.observed(opened, EVERYTHING)
        say(f"found {found}")
        work = steps(chance, model.from_state(found))
        for _ in range(chance.randint(4, 9)):
            step = next(work)
            say(f"begin {step.then.state()}")
            step.call(opened)
            say("done")


class States:
    """What a store may hold at any time of a record."""

    def __init__(self, records: list[Record]) -> None:
        """Raises AssertionError if a process found something else when it opened the store."""
        self.moments = [0]
        """When what is allowed changes."""
        self._states, self._seen = [[model.Model().state()]], [set[str]()]
        for place, record in enumerate(records, 1):
            if record.kind == "n":
                what, _, state = record.path.partition(" ")
                before = self._states[-1]
                if what == "found" and state not in before:
                    raise AssertionError(f"a killed process left {state}; it may leave {before}")
                now = {"found": [state], "begin": [before[-1], state], "done": before[-1:]}[what]
                self.moments.append(place)
                self._states.append(now)
                self._seen.append(self._seen[-1].union(*map(_texts, now)))

    def at(self, place: int) -> tuple[list[str], set[str]]:
        """The states that are allowed once so many records are done, and texts that must not be there any more."""
        at = bisect_right(self.moments, place) - 1
        return self._states[at], self._seen[at].difference(*map(_texts, self._states[at]))


def _texts(state: str) -> set[str]:
    return set(json.loads(state)["chunks"])


def check(folder: Path, allowed: list[str], gone: set[str], chance: random.Random) -> list[str]:
    """What is wrong with a store after a power cut."""
    wrong: list[str] = []
    collect.SWEEP_EVERY_S = SWEEP_EVERY_S
    with ChunkStore(folder) as opened:
        found = model.observed(opened, EVERYTHING)
        if found not in allowed:
            wrong.append(f"holds {found}; may hold {allowed}")
        if not (checked := opened.check(share=1.0)).is_sound or opened.damaged_count:
            wrong.append(f"not sound: {checked}, {opened.damaged_count} set aside")
    (folder / "index.db").unlink()
    with ChunkStore(folder) as opened:
        before, found = found, model.observed(opened, EVERYTHING)
    one, other = model.from_state(before), model.from_state(found)
    if one.chunks != other.chunks or not set(one.entries) <= set(other.entries):  # more were whole, without their rows
        wrong.append(f"holds {before}; rebuilt it holds {found}")
    for text in sorted(gone):
        wrong += [f"deleted text {text} in {path.relative_to(folder)}" for path in containing(folder, text.encode())]
    collect.SWEEP_EVERY_S = 0.0
    with ChunkStore(folder) as opened:
        files = entry_files(opened)
        wrong += left_over(folder, {path.name for path in files})
        if files:
            turn_over(chance.choice(files), chance)
        had = set(model.from_state(found).entries)
        left = model.loaded(opened, had)
        if len(left) != len(had) - bool(files):
            wrong.append("a bit that turned over went unnoticed")
        opened.add_chunk(namespace="default", level=1, text="<text 0>")
        model.publish(opened, [*had, model.Known("<text 0>")])
        if model.loaded(opened, EVERYTHING) != had | {model.Known("<text 0>")}:
            wrong.append("what is written next is not there")
    return wrong


def turn_over(path: Path, chance: random.Random) -> None:
    """Turn over one bit of an entry's tensors."""
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[chance.randrange(begin, begin + 4800)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=int, default=50)
    parser.add_argument("--states", type=int, default=40, help="different ones of each workload")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planted", choices=list(PLANTED), help="a bug, to see that it is noticed")
    options = parser.parse_args()
    if options.planted:
        PLANTED[options.planted]()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in range(options.seed, options.seed + options.workloads):
        with tempfile.TemporaryDirectory() as scratch:
            one_workload(Path(scratch), seed, options.states, counts, wrong)
    sys.stdout.write(json.dumps({"counts": dict(counts), "wrong": wrong}, indent=1) + "\n")


def one_workload(scratch: Path, seed: int, wanted: int, counts: Counter[str], wrong: list[str]) -> None:
    top, log, left, chance = scratch / "top", scratch / "log", scratch / "left", random.Random(seed)
    top.mkdir()
    last = chance.randint(2, 4)
    for part in range(last + 1):
        kill_at = 0 if part == last else chance.choice((0, chance.randint(1, 12), chance.randint(1, 150)))
        said, code = forked(lambda _, part=part, kill_at=kill_at: work(top, log, f"{seed} {part}", kill_at))
        counts["processes"] += 1
        counts["killed processes"] += code == -signal.SIGKILL
        if said:
            wrong.append(f"workload {seed}, process {part}: {said}")
            return
    records = list(read_log(log))
    counts["workloads"] += 1
    counts["recorded calls"] += len(records)
    try:
        states = States(records)
    except AssertionError as error:
        wrong.append(f"workload {seed}: {error}")
        return
    checked: set[bytes] = set()
    syncs = [place for place, record in enumerate(records, 1) if record.kind == "s"]
    for _ in range(10 * wanted):
        place = chance.choice((chance.choice(states.moments), chance.choice(syncs), chance.randint(0, len(records))))
        kind = chance.choice(KINDS)
        remake(top, records[:place], left, kind, chance)
        allowed, gone = states.at(place)
        state = hashlib.sha256(repr((sorted(content_of(left).items()), allowed)).encode()).digest()
        if state in checked:
            continue
        checked.add(state)
        counts["states"] += 1
        counts[f"states, {kind} left"] += 1
        try:
            found = check(left / STORE, allowed, gone, chance)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        wrong.extend(f"workload {seed}, cut at {place}, {kind} left: {each}" for each in found)
        if len(checked) == wanted:
            break
    remake(top, records, left, "everything", chance)
    if content_of(left) != content_of(top):
        wrong.append(f"workload {seed}: the record lacks something")


def remake(top: Path, records: list[Record], left: Path, kind: str, chance: random.Random) -> None:
    """Do what was recorded on a disk of its own, cut the power, and write what is left to a folder."""
    disk = Disk(top)
    for record in records:
        disk.apply(record)
    shutil.rmtree(left, ignore_errors=True)
    left.mkdir()
    disk.left(left, kind, chance)


if __name__ == "__main__":
    main()
