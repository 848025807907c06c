"""Forked processes that say what they do, and what a store's folder must not hold once it was opened."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from braidsdk.store import ChunkStore, entries


def forked(run: Callable[[Callable[[str], object]], object]) -> tuple[list[str], int]:
    """What a forked process says, and how it ended: 0, its signal, or 1 after an error that is not ours."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with os.fdopen(reading) as file:
            lines = file.read().splitlines()
        return lines, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 0
    try:
        run(lambda line: os.write(writing, f"{' '.join(line.split())}\n".encode()))
    except BaseException as error:
        os.write(writing, f"raw {type(error).__name__}: {error}\n".encode())
        code = 1
    os._exit(code)


def left_over(folder: Path, known: Collection[str] | None = None) -> list[str]:
    """What opening should have collected: unfinished files, journals, and files of entries but the known ones."""
    return [
        f"left {path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.name.endswith((".part", "-journal"))
        or (known is not None and path.suffix == ".safetensors" and path.name not in known)
    ]


def entry_files(opened: ChunkStore) -> list[Path]:
    """The paths of all entries that the index knows."""
    with opened._index.read() as db:
        return [opened._layout.entry(digest) for digest in entries.all_digests(db)]


def containing(folder: Path, text: bytes) -> list[Path]:
    """The files that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]
