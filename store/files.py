"""Knows where a store's files lie, and moves them durably.

    index.db                             the index; it is rebuilt from the entries if it is missing
    entries/<2 hex>/<digest>.safetensors one KV entry each, immutable
    tmp/                                 files that are being written; leftovers are removed after an hour
    damaged/                             entries that were set aside

Every path is made from a digest or from a name that `set_aside` gives. An index may come from anyone, so nothing in it
may lead out of the store. Knows nothing about the content of files or of the index.
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
"""A file of this age that no row of the index names is assumed to come from a killed process."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_ENTRY = re.compile(r"[0-9a-f]{32}\.safetensors")
_DAMAGED = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{8}\.safetensors")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}\.part|\.tmp[0-9A-Za-z]{6}")  # ours, and safetensors' own

Stamp = tuple[int, int, int]
"""Tells a file from another one that takes its path later: inode, time of change in ns, size in bytes."""


class Layout:
    """The folders of one store.

    Attributes:
        root: the store's folder.
        mode: permission bits that a new file gets here from the process's umask.
    """

    def __init__(self, root: Path) -> None:
        """Create the store's folders if they are missing, and check that they can be written.

        Raises:
            StorePathError: a file is in the way, or a folder can't be written.
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
                f"The store's path must be a folder or free; got {root} with a file in the way. Choose another path."
            ) from None
        except OSError as error:
            raise StorePathError(
                f"The store's folder must be writable; got {root}: {error.strerror}. Choose another path or correct "
                "its permissions."
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
        """The folder of files that are being written."""
        return self.root / "tmp"

    @property
    def damaged(self) -> Path:
        """The folder of files that were set aside."""
        return self.root / "damaged"

    def entry(self, digest: str) -> Path:
        """The path of the entry with this digest. Raises the same errors as `entry_name`."""
        return self.root / entry_name(digest)

    def temporary(self, digest: str) -> Path:
        """A new path to write an entry to before it is moved to its place."""
        return self.tmp / f"{digest}.{secrets.token_hex(8)}.part"

    def place(self, moves: Iterable[tuple[Path, str]]) -> None:
        """Move finished files to the places of their digests, durably."""
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
        """Move an entry's damaged file to damaged/ and return its name there. Returns None if it is gone already."""
        name = f"{digest}.{secrets.token_hex(4)}.safetensors"
        try:
            self.entry(digest).replace(self.damaged / name)
        except FileNotFoundError:
            return None
        return name

    def remove_damaged(self, name: str) -> None:
        """Remove a file that was set aside under this name. Ignores a name that `set_aside` never gives."""
        if _DAMAGED.fullmatch(name):
            remove(self.damaged / name)

    def digests(self) -> Iterator[str]:
        """The digest of every entry's file. This lists all files, which takes seconds for millions."""
        for folder in sorted(self.entries.iterdir()):
            if len(folder.name) == 2 and folder.is_dir():
                for name in sorted(path.name for path in folder.iterdir()):
                    if _ENTRY.fullmatch(name) and name.startswith(folder.name):
                        yield name.removesuffix(".safetensors")

    def sweep_temporaries(self) -> None:
        """Remove what killed writers left in tmp/. Files that aren't ours are not touched."""
        for path in self.tmp.iterdir():
            if _TEMPORARY.fullmatch(path.name) and is_old(path):
                remove(path)


def entry_name(digest: str) -> str:
    """The path of the entry with this digest, relative to its store.

    Raises:
        StoreCorruptError: it is not a digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise StoreCorruptError(
            f"An entry's digest must be 32 hex digits; got {shown(digest)}. Move the index aside (index.db, "
            "index.db-wal, index.db-shm): the next open rebuilds it from the entries."
        )
    return f"entries/{digest[:2]}/{digest}.safetensors"


def is_old(path: Path) -> bool:
    """Whether a file has not changed for so long that no living process can be writing it."""
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_AGE_S
    except FileNotFoundError:
        return False


def stamp(path: Path) -> Stamp | None:
    """Return the stamp of the file at a path, or None if there is no file."""
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
