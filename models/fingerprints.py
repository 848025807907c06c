"""Remembers what was found out about checkpoints, so that opening one again need not find it again: the fingerprint of
the weights say, for which every weight is hashed and checked.

A record is valid only for the same files that it was made from: their resolved paths, sizes, times and inodes. If there
is any doubt, no record is used, and the checkpoint is read as if it were new.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again within one tick of its time stamp."""

_VERSION = 1  # raise it when fingerprints are made in another way
_KEPT = 128


def stamp(files: Sequence[Path]) -> str:
    """A hash that tells these files, as they are now, from any others.

    It includes the status change time, because a tool that sets the modification time back can't set that one.

    Raises:
        OSError: a file is not there.
    """
    found = [(str(path), path.stat()) for path in (file.resolve() for file in files)]
    seen = [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in found]
    return xxhash.xxh3_128_hexdigest(json.dumps([_VERSION, seen]).encode())


def libraries(*names: str) -> list[Path]:
    """Files that change when one of these packages is installed again. Imports none of them."""
    specs = map(find_spec, names)
    return [Path(spec.origin) for spec in specs if spec and spec.origin]


def recall(file: Path, key: str) -> Any:
    """What a file remembers for a stamp, or None. A damaged file remembers nothing."""
    match _records(file).get(key):
        case [found, check] if check == _check(key, found):
            return found
    return None


def remember(file: Path, key: str, checkpoint: Sequence[Path], found: object) -> None:
    """Remember what was found in files that were read after they had this stamp, unless they may have changed.

    The newest records are kept. A file that can't be written stays as it is, because it only saves time.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        stats = [path.stat() for path in checkpoint]
        newest = max(max(s.st_mtime_ns, s.st_ctime_ns) for s in stats)
        if stamp(checkpoint) != key or time.time_ns() - newest < SETTLED_NS:
            return
        records = {**_records(file), key: [found, _check(key, found)]}
        try:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(dict(list(records.items())[-_KEPT:]), indent=0))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _records(file: Path) -> dict[str, object]:
    try:
        records = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return records if isinstance(records, dict) else {}


def _check(key: str, found: object) -> str:
    return xxhash.xxh3_64_hexdigest(f"{key} {json.dumps(found)}".encode())
