"""Where a store's files lie, and moving them durably.

    index.db                             the index, rebuilt from the entries when it is missing
    entries/<2 hex>/<digest>.safetensors one KV entry each, immutable
    tmp/                                 files being written; what a killed process left goes after an hour
    damaged/                             entries that were set aside

Every path comes from a digest, or from a name that `set_aside` gives: an index may come from anyone, so nothing that it
says leads out of the store. Knows nothing of what is inside a file or in the index.
"""

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from braidsdk.errors import StoreCorruptError, StorePathError, shown

LEFTOVER_AGE_S = 3600.0
"""Age from which a file that no row of the index names is taken for a killed process's."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_ENTRY = re.compile(r"[0-9a-f]{32}\.safetensors")
_DAMAGED = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{8}\.safetensors")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}\.part|\.tmp[0-9A-Za-z]{6}")  # ours, and safetensors' own

Stamp = tuple[int, int, int]
"""What tells one file at a path from its successor: inode, time of change in ns, size in bytes."""


class Layout:
    """The folders of one store.

    Attributes:
        root: the store's folder.
        mode: permission bits that a new file gets here, by the process's umask.
    """

    def __init__(self, root: Path) -> None:
        """Create what is missing of the store's folders and check that they can be written.

        Raises:
            StorePathError: there is a file in the way, or it can't be written.
        """
        self.root = root
        try:
            for folder in (self.root, self.entries, self.tmp, self.damaged):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.temporary("0" * 32)
            descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            self.mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            probe.unlink()
            sync_folder(self.root)
        except (FileExistsError, NotADirectoryError):
            raise StorePathError(
                f"Expected a folder for the store at {root}, got a path with a file in the way. Choose another path."
            ) from None
        except OSError as error:
            raise StorePathError(
                f"Expected a folder that can be written at {root}, got: {error.strerror}. "
                "Choose another path or correct its permissions."
            ) from None

    @property
    def index(self) -> Path:
        """The index's database file."""
        return self.root / "index.db"

    @property
    def entries(self) -> Path:
        """The folder of all entries."""
        return self.root / "entries"

    @property
    def tmp(self) -> Path:
        """The folder of files being written."""
        return self.root / "tmp"

    @property
    def damaged(self) -> Path:
        """The folder of files set aside."""
        return self.root / "damaged"

    def entry(self, digest: str) -> Path:
        """Where the entry of this digest lies; raises as `entry_name`."""
        return self.root / entry_name(digest)

    def temporary(self, digest: str) -> Path:
        """A new path to write an entry to before it is moved to its place."""
        return self.tmp / f"{digest}.{secrets.token_hex(8)}.part"

    def place(self, moves: Iterable[tuple[Path, str]]) -> None:
        """Move finished files to the places of their digests, and make that durable."""
        folders = set()
        for source, digest in moves:
            target = self.entry(digest)
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                folders.add(self.entries)
            source.replace(target)
            folders.add(target.parent)
        for folder in folders:
            sync_folder(folder)

    def set_aside(self, digest: str) -> str | None:
        """Move an entry's damaged file to damaged/ and return its name there; None if it is gone already."""
        name = f"{digest}.{secrets.token_hex(4)}.safetensors"
        try:
            self.entry(digest).replace(self.damaged / name)
        except FileNotFoundError:
            return None
        return name

    def remove_damaged(self, name: str) -> None:
        """Remove a file that was set aside under this name. A name that `set_aside` never gives is no file of ours."""
        if _DAMAGED.fullmatch(name):
            remove(self.damaged / name)

    def digests(self) -> Iterator[str]:
        """The digest of every file in an entry's place. Reads the name of every entry: seconds for millions."""
        for folder in sorted(self.entries.iterdir()):
            if len(folder.name) == 2 and folder.is_dir():
                for name in sorted(path.name for path in folder.iterdir()):
                    if _ENTRY.fullmatch(name) and name.startswith(folder.name):
                        yield name.removesuffix(".safetensors")

    def sweep_temporaries(self) -> None:
        """Remove what killed writers left in tmp/. Files that aren't ours are left alone."""
        for path in self.tmp.iterdir():
            if _TEMPORARY.fullmatch(path.name) and is_old(path):
                remove(path)


def entry_name(digest: str) -> str:
    """Where the entry of this digest lies, relative to its store.

    Raises:
        StoreCorruptError: it is no digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise StoreCorruptError(
            f"An entry's digest must be 32 hex digits; got {shown(digest)}. Move the index aside (index.db, "
            "index.db-wal, index.db-shm): the next open rebuilds it from the entries."
        )
    return f"entries/{digest[:2]}/{digest}.safetensors"


def is_old(path: Path) -> bool:
    """Whether a file has lain unchanged for so long that no living writer is at it."""
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_AGE_S
    except FileNotFoundError:
        return False


def stamp(path: Path) -> Stamp | None:
    """Return the stamp of the file at a path, None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
