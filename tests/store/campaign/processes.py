"""Forked processes that say what they do, and what a store's folder must not hold once it was opened."""

import os
from collections.abc import Callable, Collection
from pathlib import Path


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


def left_over(folder: Path, known: Collection[str]) -> list[str]:
    """What opening should have collected: unfinished files, journals, and entries' files that have no row."""
    return [
        f"left {path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.name.endswith((".part", "-journal")) or (path.suffix == ".safetensors" and path.name not in known)
    ]


def containing(folder: Path, text: bytes) -> list[Path]:
    """The files that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]
