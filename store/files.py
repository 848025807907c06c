"""Knows where a store's files lie, and moves them durably.

    index.db                             the index; it is rebuilt from the files if it is missing. It, the reserve and
                                         the locks may be in a folder elsewhere (see places.py)
    chunks/<2 hex>/<id>.json             one chunk each: text, names, metadata (see catalogue.py)
    entries/<2 hex>/<digest>.safetensors one KV entry each, immutable
    tmp/<owner>.lock                     locked for as long as a process has the store open
    tmp/<owner>.<digest>.<8 hex>.part    files that it is writing; removed by others once it does not live any more
    damaged/                             files that were set aside
    limits.json                          how large the store may become (see limits.py)
    reserve                              space that deleting uses when the disk is full
    queue.lock                           what writers of the index queue for
    claims.lock, leases.lock             whose bytes stand for entries that processes compute or read (see claims.py)

Every path is made from a digest or from a name that `set_aside` gives. An index may come from anyone, so nothing in it
may lead out of the store. Knows nothing about the content of files or of the index.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from braidsdk.errors import StoreCorruptError, StorePathError, shown
from braidsdk.store.places import home_of, mark

_DIGEST = re.compile(r"[0-9a-f]{32}")
_DAMAGED = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{8}\.(safetensors|json)")
_OLD_INDEX = re.compile(r"index\.[0-9a-f]{8}\.db(-journal|-wal|-shm)?")
_OWNED = re.compile(r"([0-9a-f]{16})\.(lock|[0-9a-f]{32}\.[0-9a-f]{8}\.part)")

RESERVE_BYTES = 2**20
"""What the journal of a deletion needs, and more."""

REPAIR = "Run `braid store repair`: it rebuilds the index from the files of chunks and entries."

Stamp = tuple[int, int, int]
"""Tells a file from another one that takes its path later: inode, time of change in ns, size in bytes."""


class Layout:
    """The folders of one store.

    Attributes:
        root: the store's folder.
        home: the folder of its index and its locks: the same, or one elsewhere.
        read_only: whether nothing can be written there.
        mode: permission bits of a new file: the owner's, and those of others that may write to the store's folder.
    """

    def __init__(self, root: Path, index: str | Path | None = None) -> None:
        """Create the store's folders and an empty index if they are missing. A store that can't be written is opened
        to be read.

        Raises:
            StorePathError: a file is in the way, or a folder can't be written and is no store; or see
                `places.home_of`, which takes `index`.
        """
        self.root = root
        self.home = home_of(root, index)
        self.read_only = False
        self._process = os.getpid()
        self._owner = ""
        self._lock: int | None = None
        self._synced: set[Path] = set()
        try:
            self._create()
        except (FileExistsError, NotADirectoryError):
            raise StorePathError(
                f"The store's path must be a folder or free; got {root} with a file in the way. Choose another path."
            ) from None
        except OSError as error:
            self.close()
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and os.access(self.index, os.R_OK):
                self.read_only = True
                return
            raise StorePathError(
                f"The store's folder must be writable; got {root}: {error.strerror}. Choose another path or correct "
                "its permissions."
            ) from None

    def _create(self) -> None:
        if not self.index.exists():
            _make_durably(self.root)
            if self.home != self.root:
                _make_durably(self.home)
                mark(self.root, self.home)
                sync_folder(self.root)
        bits = self.root.stat().st_mode
        shared = (stat.S_IRWXG if bits & stat.S_IWGRP else 0) | (stat.S_IRWXO if bits & stat.S_IWOTH else 0)
        self.mode, self._folder_mode = 0o600 | (shared & 0o066), 0o700 | shared | (bits & stat.S_ISGID)
        for folder in (self.entries, self.tmp, self.damaged, self.owners):
            self._make_folder(folder)
        self._lock = self._live()
        if not self.index.exists():
            # Made under another name, because closing it would end the locks that this process has on it.
            new = self.owners / self.temporary("0" * 32).name
            os.close(self._open_new(new))
            with contextlib.suppress(FileExistsError):
                os.link(new, self.index)
            new.unlink()
            sync_folder(self.home)
        for path in (self.queue, self.claims, self.leases):
            with contextlib.suppress(FileExistsError):
                os.close(self._open_new(path))
        sync_folder(self.root)

    def _make_folder(self, folder: Path) -> None:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            folder.chmod(self._folder_mode)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))

    def _live(self) -> int:
        """Lock a file of this process's own for as long as the store is open."""
        while True:
            self._owner = secrets.token_hex(8)
            path = self.owners / f"{self._owner}.lock"
            descriptor = self._open_new(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if stamp(path) is not None:
                return descriptor
            os.close(descriptor)  # a sweep locked it first, and took it for one of a dead process

    def _open_new(self, path: Path) -> int:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, self.mode)
        return descriptor

    def close(self) -> None:
        """Let others remove what this process has not finished. Safe to call twice."""
        descriptor, self._lock = self._lock, None
        if descriptor is not None and self._process == os.getpid():
            with contextlib.suppress(OSError):  # a later open sweeps what is left
                remove(self.owners / f"{self._owner}.lock")
            os.close(descriptor)

    @property
    def index(self) -> Path:
        """The index's database file."""
        return self.home / "index.db"

    @property
    def entries(self) -> Path:
        """The folder of all entries."""
        return self.root / "entries"

    @property
    def tmp(self) -> Path:
        """The folder of files that are being written."""
        return self.root / "tmp"

    @property
    def owners(self) -> Path:
        """The folder of the locks of processes that have the store open."""
        return self.home / "tmp"

    @property
    def damaged(self) -> Path:
        """The folder of files that were set aside."""
        return self.root / "damaged"

    @property
    def chunks(self) -> Path:
        """The folder of all chunks' files. It is made once the index knows which files it must have."""
        return self.root / "chunks"

    def entry(self, digest: str) -> Path:
        """The path of the entry with this digest. Raises the same errors as `entry_name`."""
        return self.root / entry_name(digest)

    def chunk(self, chunk_id: str) -> Path:
        """The path of the file of the chunk with this id.

        Raises:
            StoreCorruptError: it is not an id.
        """
        return self.chunks / _checked(chunk_id)[:2] / f"{chunk_id}.json"

    @property
    def queue(self) -> Path:
        """The file whose lock writers of the index queue for."""
        return self.home / "queue.lock"

    @property
    def claims(self) -> Path:
        """The file of claims."""
        return self.home / "claims.lock"

    @property
    def leases(self) -> Path:
        """The file of leases."""
        return self.home / "leases.lock"

    @property
    def limits(self) -> Path:
        """The file of limits."""
        return self.root / "limits.json"

    def temporary(self, digest: str) -> Path:
        """A new path to write an entry to before it is moved to its place."""
        return self.tmp / f"{self._owner}.{digest}.{secrets.token_hex(4)}.part"

    def place(self, moves: Iterable[tuple[Path, Path]], removed: Iterable[Path] = ()) -> None:
        """Move finished files of entries or chunks to their places, and remove others, durably."""
        folders = set()
        for source, target in moves:
            if target.parent not in self._synced:  # whoever has made it may not have synced it
                self._make_folder(target.parent)
                folders.add(target.parent.parent)
            source.replace(target)
            folders.add(target.parent)
        for path in removed:
            remove(path)
            if path.parent.is_dir():  # whoever has removed it may not have synced it
                folders.add(path.parent)
        for folder in folders:
            sync_folder(folder)
        self._synced |= folders

    def make_chunks(self) -> None:
        """Make the folder of the chunks' files, durably."""
        self._make_folder(self.chunks)
        sync_folder(self.root)

    def remove_entries(self, digests: Iterable[str]) -> None:
        """Remove entries' files durably, because a power cut must not bring deleted text back. Ignores those that are
        gone already."""
        _remove_durably(map(self.entry, digests))

    def aside_name(self, path: Path) -> str:
        """A new name in damaged/ for the file of an entry or a chunk."""
        return f"{path.stem}.{secrets.token_hex(4)}{path.suffix}"

    def set_aside(self, path: Path, name: str | None = None) -> str | None:
        """Move the damaged file of an entry or a chunk to damaged/, durably, and return its name there. Returns None if
        it is gone already."""
        name = name or self.aside_name(path)
        try:
            path.replace(self.damaged / name)
        except FileNotFoundError:
            return None
        sync_folder(self.damaged)
        sync_folder(path.parent)
        return name

    def set_index_aside(self) -> str | None:
        """Move the index and its journal to damaged/, and return the index's name there. Returns None if there is
        none."""
        name = f"index.{secrets.token_hex(4)}.db"
        moved = None
        # The journal goes first: without it the index is damaged at worst, and it must not meet a new index.
        for path in reversed(index_files(self.home)):
            aside = self.damaged / f"{name}{path.name.removeprefix('index.db')}"
            with contextlib.suppress(FileNotFoundError):
                shutil.move(path, aside)  # damaged/ may be on another disk
                moved = aside.name
        sync_folder(self.home)
        return moved

    def remove_damaged(self, names: Iterable[str]) -> None:
        """Remove files that were set aside under these names, durably, and indexes that were, because texts are in them
        that are deleted now. Ignores names that `set_aside` never gives."""
        old = [path for path in self.damaged.iterdir() if _OLD_INDEX.fullmatch(path.name) and not path.is_dir()]
        _remove_durably([*old, *(self.damaged / name for name in names if _DAMAGED.fullmatch(name))])

    def digests(self) -> Iterator[str]:
        """The digest of every entry's file. This lists all files, which takes seconds for millions."""
        return _listed(self.entries, ".safetensors")

    def chunk_ids(self) -> Iterator[str]:
        """The id of every chunk's file. This lists all files, which takes seconds for millions."""
        return _listed(self.chunks, ".json") if self.chunks.is_dir() else iter(())

    def sweep_damaged(self, before: float) -> int:
        """Remove what was set aside before a time, in seconds since 1970, and return how many files. A file from the
        future, after the clock was wrong, stays."""
        count = 0
        for path in self.damaged.iterdir():
            if _DAMAGED.fullmatch(path.name) or _OLD_INDEX.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process collects too
                    if path.lstat().st_ctime < before and not path.is_dir():
                        path.unlink()
                        count += 1
        return count

    def keep_reserve(self) -> None:
        """Keep some space for the time when the disk is full, as far as there is any."""
        path = self.home / "reserve"
        with contextlib.suppress(OSError):
            if path.exists() and path.stat().st_size >= RESERVE_BYTES:
                return
            remove(path)
            descriptor = self._open_new(path)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            except OSError:
                remove(path)
            finally:
                os.close(descriptor)

    def use_reserve(self) -> bool:
        """Free the reserved space. Returns whether there was any."""
        try:
            (self.home / "reserve").unlink()
        except OSError:
            return False
        return True

    def sweep_temporaries(self) -> None:
        """Remove what processes left in tmp/ that do not live any more. Files that aren't ours are not touched."""
        names = {path.name for folder in (self.tmp, self.owners) for path in folder.iterdir()}
        for owner in {found[1] for name in names if (found := _OWNED.fullmatch(name))}:
            if owner != self._owner:
                self._sweep_owner(owner)

    def _sweep_owner(self, owner: str) -> None:
        lock = self.owners / f"{owner}.lock"
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = None  # it was closed, or another process sweeps
        try:
            if descriptor is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.tmp.glob(f"{owner}.*.part"):
                remove(path)
            remove(lock)
        except BlockingIOError:
            return  # it lives
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _make_durably(folder: Path) -> None:
    """Create a folder and its parents, durably. The last one that is there already is synced too: whoever made it may
    have been killed before."""
    paths = (folder, *folder.parents)
    there = next(number for number, path in enumerate(paths) if path.exists())
    for path in reversed(paths[: there + 1]):
        path.mkdir(mode=0o700 if path is folder else 0o777, exist_ok=True)
        with contextlib.suppress(PermissionError):  # it can be written and not be read
            sync_folder(path.parent)


def index_files(root: Path) -> list[Path]:
    """The paths of a store's index, of its journal, and of what other modes of SQLite leave beside it."""
    return [root / f"index.db{suffix}" for suffix in ("", "-journal", "-wal", "-shm")]


def entry_name(digest: str) -> str:
    """The path of the entry with this digest, relative to its store.

    Raises:
        StoreCorruptError: it is not a digest.
    """
    return f"entries/{_checked(digest)[:2]}/{digest}.safetensors"


def _checked(digest: str) -> str:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise StoreCorruptError(f"A digest must be 32 hex digits; got {shown(digest)}. {REPAIR}")
    return digest


def _listed(folder: Path, suffix: str) -> Iterator[str]:
    """The digests that the files below a folder have as their names."""
    for part in sorted(folder.iterdir()):
        if len(part.name) == 2 and part.is_dir():
            for path in sorted(part.iterdir()):
                if path.suffix == suffix and _DIGEST.fullmatch(path.stem) and path.name.startswith(part.name):
                    yield path.stem


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


def _remove_durably(paths: Iterable[Path]) -> None:
    folders = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
