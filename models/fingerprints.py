"""Remembers fingerprints of checkpoints, so that opening one again need not hash and check every weight.

A record is valid only for the same files that it was made from: their resolved paths, sizes, times and inodes. If there
is any doubt, no record is used, and the checkpoint is read as if it were new.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again within one tick of its time stamp."""

_VERSION = 1  # raise it when fingerprints are made in another way
_KEPT = 64


def stamp(files: Sequence[Path]) -> str:
    """A hash that tells these files, as they are now, from any others.

    It includes the status change time, because a tool that sets the modification time back can't set that one.

    Raises:
        OSError: a file is not there.
    """
    found = [(str(path), path.stat()) for path in (file.resolve() for file in files)]
    seen = [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in found]
    return xxhash.xxh3_128_hexdigest(json.dumps([_VERSION, seen]).encode())


def recall(file: Path, key: str) -> str | None:
    """The fingerprint that a file remembers for a stamp, or None. A damaged file remembers nothing."""
    match _records(file).get(key):
        case [str(fingerprint), check] if check == _check(key, fingerprint):
            return fingerprint
    return None


def remember(file: Path, key: str, checkpoint: Sequence[Path], fingerprint: str) -> None:
    """Remember the fingerprint of a checkpoint that was read after it had this stamp, unless it may have changed.

    The newest records are kept. A file that can't be written stays as it is, because it only saves time.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        stats = [path.stat() for path in checkpoint]
        newest = max(max(s.st_mtime_ns, s.st_ctime_ns) for s in stats)
        if stamp(checkpoint) != key or time.time_ns() - newest < SETTLED_NS:
            return
        records = {**_records(file), key: [fingerprint, _check(key, fingerprint)]}
        try:
            temporary.write_text(json.dumps(dict(list(records.items())[-_KEPT:]), indent=0))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _records(file: Path) -> dict[str, object]:
    try:
        records = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def _check(key: str, fingerprint: str) -> str:
    return xxhash.xxh3_64_hexdigest(f"{key} {fingerprint}".encode())
