"""Processes that register the same texts at once: each entry is computed once, and nothing is wrong without locks.

    python together.py --processes 32 --keys 50 [--without-locks]

Each process opens a `FakeBraid` of its own over one store, and registers a system prompt and the other texts one by one
in an order of its own. Without locks every claim is granted and flock does nothing. Then all compute the first entry at
once, and opening sweeps away what others are writing: calls may fail, and are tried again. Prints JSON.
"""

import argparse
import fcntl
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from conftest import content
from processes import entry_files, left_over

from braidsdk.errors import StoreError
from braidsdk.store import ChunkStore, Publication, blobs, collect
from braidsdk.store.claims import Claims
from braidsdk.testing import FakeBraid

RULES = "You answer from the documents."
TRIES = 50
WAIT_S = 300.0


def register(folder: Path, texts: Sequence[str]) -> None:
    with FakeBraid({}, store=folder) as braid:
        anchor = braid.register_system(RULES)
        for text in texts:
            braid.register(text, anchor=anchor)


def start(folder: Path, log: Path, texts: Sequence[str], all_of_them: Barrier) -> int:
    """A process that registers all texts once all processes are there, and writes down its errors."""
    if pid := os.fork():
        return pid
    try:
        all_of_them.wait(WAIT_S)
        for _ in range(TRIES):
            try:
                register(folder, texts)
                os._exit(0)
            except StoreError as error:
                note(log, f"error {error}")
    except BaseException as error:
        note(log, f"raw {type(error).__name__}: {error}")
    finally:
        os._exit(1)


def note(log: Path, line: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{' '.join(line.split())}\n".encode())
    os.close(file)


def write_down_what_is_computed(log: Path, together: Barrier | None) -> None:
    """With a barrier, each process waits before it publishes for the first time, so that all have computed the same."""
    publish = ChunkStore.publish
    waits = [together] if together else []

    def spied(self: ChunkStore, publications: Sequence[Publication]) -> None:
        while waits:
            waits.pop().wait(WAIT_S)
        for key, _, _ in publications:
            note(log, f"computed {key.digest}")
        publish(self, publications)

    ChunkStore.publish = spied  # type: ignore[method-assign]


def take_locks_out() -> None:
    made = Claims.__init__
    Claims.__init__ = lambda self, path: made(self, None)  # type: ignore[method-assign]
    fcntl.flock = lambda descriptor, operation: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=32)
    parser.add_argument("--keys", type=int, default=50)
    parser.add_argument("--without-locks", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    collect.SWEEP_EVERY_S = 0.0
    texts = [f"Text number {number}, which is not long." for number in range(options.keys - 1)]
    with tempfile.TemporaryDirectory() as made:
        folder, alone, log = Path(made, "store"), Path(made, "alone"), Path(made, "log")
        register(alone, texts)
        all_of_them = get_context("fork").Barrier(options.processes)
        write_down_what_is_computed(log, all_of_them if options.without_locks else None)
        if options.without_locks:
            take_locks_out()
        pids = []
        for number in range(options.processes):
            own = random.Random(number).sample(texts, len(texts))
            pids.append(start(folder, log, own, all_of_them))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        lines = log.read_text().splitlines()
        computed = [line for line in lines if line.startswith("computed ")]
        errors = [line for line in lines if line.startswith("error ")]
        wrong = [line for line in lines if line.startswith("raw ")]
        if any(codes):
            wrong.append(f"processes ended with {codes}")
        if not options.without_locks:
            wrong += errors
        wrong += check(folder, alone)
    counts = {"computed": len(computed), "entries": len(set(computed)), "errors": len(errors)}
    sys.stdout.write(json.dumps({"counts": counts, "wrong": wrong}, indent=1) + "\n")


def check(folder: Path, alone: Path) -> list[str]:
    """How a store differs from one that a single process has filled."""
    wrong = []
    with ChunkStore(folder) as opened, ChunkStore(alone) as other:
        checked = opened.check(share=1.0)
        if not checked.is_sound or checked.stray or opened.damaged_count:
            wrong.append(f"not sound: {checked}, {opened.damaged_count} set aside")
        files = {path.name: path for path in entry_files(opened)}
        wanted = {path.name: path for path in entry_files(other)}
        if set(files) != set(wanted):
            wrong.append(f"has {len(files)} entries, and lacks or has too many of {len(wanted)}")
        wrong += [
            f"entry {name} is wrong"
            for name in files.keys() & wanted.keys()
            if content(blobs.read(files[name]).tensors) != content(blobs.read(wanted[name]).tensors)
        ]
        if {row.text for row in opened.list_chunks("default")} != {row.text for row in other.list_chunks("default")}:
            wrong.append("its texts are others")
        wrong += left_over(folder, files)
    return wrong


if __name__ == "__main__":
    main()
