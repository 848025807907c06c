"""Processes that work on one store and are killed at random moments.

    python kills.py --kills 1000 [--workers 4] [--seed 0]

Each worker has a namespace of its own, opens the store, checks that it holds what was acknowledged there, and then
adds, publishes, loads and deletes until it is killed; opening collects what others left while they work. All publish,
load and delete the same entries of one more namespace. After each kill a new worker goes on, and now and then all are
killed at once and everything that is left is checked. Prints JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from processes import entry_files, left_over
from workload import TEXTS, steps, universe

from braidsdk.errors import UnknownChunkError
from braidsdk.store import ChunkStore, collect

EVERYTHING = universe()
SHARED = "shared"
KEPT = model.Known("<text 0>")
"""An entry of the shared namespace that nobody deletes."""


def work(folder: Path, log: Path, number: int, seed: str) -> None:
    """Work until killed. The log gets what the namespace may hold, before each step and after it."""
    chance, space = random.Random(seed), f"worker {number}"
    said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    say = lambda line: os.write(said, f"\n{line}".encode())  # noqa: E731
    with ChunkStore(folder) as opened:
        allowed = states(log)
        found = model.observed(opened, EVERYTHING, space)
        if found not in allowed:
            raise AssertionError(f"lost: {space} holds {found}; it may hold {allowed}")
        say(f"done {found}")
        for step in steps(chance, model.from_state(found, space)):
            say(f"begin {step.then.state()}")
            step.call(opened)
            say(f"done {step.then.state()}")
            share(opened, chance)
            if chance.random() < 0.1:
                break  # it is opened again
    os.close(said)


def share(opened: ChunkStore, chance: random.Random) -> None:
    """What all workers do with the same entries: they are right or absent, and one is always there."""
    known = [model.Known(text, None, number) for text in TEXTS[1:4] for number in (0, 1)]
    if chance.random() < 0.3:
        opened.delete_chunk(SHARED, model.id_of(chance.choice(TEXTS[1:4]), SHARED))
    else:
        one = chance.choice(known)
        opened.add_chunk(namespace=SHARED, level=1, text=str(one.text))
        with suppress(UnknownChunkError):  # another worker has deleted it since
            model.publish(opened, [one], SHARED)
    if KEPT not in model.loaded(opened, [*known, KEPT], SHARED):
        raise AssertionError("lost: the shared entry")


def states(log: Path) -> list[str]:
    """What a namespace may hold: the last state that was acknowledged, and that of the step under way. A kill may cut
    the last line of the log short."""
    under_way: list[str] = []
    for line in reversed(log.read_text().splitlines() if log.exists() else []):
        what, _, state = line.partition(" ")
        try:
            json.loads(state)
        except ValueError:
            continue
        if what == "done":
            return [state, *under_way]
        under_way = [state]
    return [model.Model().state(), *under_way]


def start(folder: Path, scratch: Path, number: int, seed: str) -> int:
    """A worker in a process of its own. What goes wrong in it is added to a file."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        while True:
            work(folder, scratch / f"log {number}", number, seed)
            seed += "+"
    except BaseException as error:
        with (scratch / "wrong").open("a") as file:
            file.write(f"worker {number}: {type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def end(pid: int) -> bool:
    """Whether a worker had to be killed."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def check(folder: Path, scratch: Path, workers: int) -> tuple[int, list[str]]:
    """How many acknowledged entries there are, and what is wrong with what is left when all were killed."""
    wrong, entries = [], 0
    with ChunkStore(folder) as opened:
        for number in range(workers):
            space = f"worker {number}"
            found, allowed = model.observed(opened, EVERYTHING, space), states(scratch / f"log {number}")
            entries += len(json.loads(allowed[0])["entries"])
            if found not in allowed:
                wrong.append(f"lost: {space} holds {found}; it may hold {allowed}")
        if not (checked := opened.check(share=1.0)).is_sound or opened.damaged_count:
            wrong.append(f"not sound: {checked}, {opened.damaged_count} set aside")
        wrong += left_over(folder, {path.name for path in entry_files(opened)})
        if [path.name for path in (folder / "tmp").iterdir()] != [f"{opened._layout._owner}.lock"]:
            wrong.append(f"left in tmp/: {sorted(path.name for path in (folder / 'tmp').iterdir())}")
    return entries, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    collect.SWEEP_EVERY_S = 0.0  # each opening collects
    chance, counts = random.Random(options.seed), Counter[str]()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        scratch, folder = Path(made), Path(made, "store")
        with ChunkStore(folder) as opened:
            opened.add_chunk(namespace=SHARED, level=1, text=str(KEPT.text))
            model.publish(opened, [KEPT], SHARED)
        while counts["kills"] < options.kills and not wrong:
            seed = f"{options.seed} {counts['kills']}"
            pids = [start(folder, scratch, number, f"{seed} {number}") for number in range(options.workers)]
            for turn in range(chance.randint(4, 20)):
                time.sleep(chance.uniform(0.0, 0.25))
                number = chance.randrange(options.workers)
                counts["kills"] += end(pids[number])
                pids[number] = start(folder, scratch, number, f"{seed} {turn} {number}")
            time.sleep(chance.uniform(0.0, 0.3))
            counts["kills"] += sum([end(pid) for pid in pids])
            acknowledged, found = check(folder, scratch, options.workers)
            counts["acknowledged entries checked"] += acknowledged
            counts["checks of everything"] += 1
            wrong += found
            if (scratch / "wrong").exists():
                wrong += (scratch / "wrong").read_text().splitlines()
        lines = [line for path in scratch.glob("log *") for line in path.read_text().splitlines()]
        counts["acknowledged steps"] = sum(line.startswith("done ") for line in lines)
    sys.stdout.write(json.dumps({"counts": dict(counts), "wrong": wrong}, indent=1) + "\n")


if __name__ == "__main__":
    main()
