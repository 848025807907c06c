"""Fingerprints of checkpoints read before, so that opening one again need not hash and check every weight.

A record holds for the very files it was made from: their resolved paths, sizes, times and inodes. Where there is a
doubt there is no record: the checkpoint is read as if it were new.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

SETTLED_NS = 2_000_000_000
"""A file changed less than this before it was read may change again within one tick of its time stamp."""

_VERSION = 1  # of how fingerprints are made
_KEPT = 64


def stamp(files: Sequence[Path]) -> str:
    """What tells these files, as they are now, from any others.

    The status change time is in it: a tool that sets the modification time back can't set that one.

    Raises:
        OSError: one is not there.
    """
    found = [(str(path), path.stat()) for path in (file.resolve() for file in files)]
    seen = [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in found]
    return xxhash.xxh3_128_hexdigest(json.dumps([_VERSION, seen]).encode())


def recall(file: Path, key: str) -> str | None:
    """The fingerprint that a file remembers for a stamp, or None; a damaged file remembers nothing."""
    match _records(file).get(key):
        case [str(fingerprint), check] if check == _check(key, fingerprint):
            return fingerprint
    return None


def remember(file: Path, key: str, checkpoint: Sequence[Path], fingerprint: str) -> None:
    """Remember the fingerprint of a checkpoint that was read since it had this stamp, unless it may have changed.

    The newest records are kept. A file that can't be written is left as it is: it only saves time.
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
