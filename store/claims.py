"""Says which entries a process computes, so that no other process computes them too, and which ones it reads, so that
no other process evicts them.

Both are locks of one byte of a file, at the place that the entry's digest names. A lock belongs to the open file, so it
ends with its process, however that ends; nothing is left to collect, and no clock is read. Where there are no such
locks every claim is granted: then entries are computed more than once, and stored once.
"""

import errno
import fcntl
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from braidsdk.store.keys import EntryKey

_FLOCK = "hhqqi4x"
"""C's `struct flock`: type, whence, start, length, process."""


EVICTION_S = 2.0
"""So long a reader waits for an eviction. One takes milliseconds."""

PAUSE_S = 0.001


class _Bytes:
    """A file whose bytes stand for entries. Digests share bytes so rarely that it does not matter: one of two waits."""

    def __init__(self, path: Path | None) -> None:
        self._file: int | None = None
        if path is not None and hasattr(fcntl, "F_OFD_SETLK"):
            self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def set(self, digest: str, kind: int) -> bool:
        """Whether the entry's byte could be locked or unlocked."""
        if self._file is None:
            return True
        try:
            fcntl.fcntl(
                self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, int(digest[:15], 16), 1, 0)
            )
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def close(self) -> None:
        """End all locks. Safe to call twice."""
        descriptor, self._file = self._file, None
        if descriptor is not None:
            os.close(descriptor)


class Claims:
    """This process's claims on entries. Safe to use from several threads, which have claims against each other too."""

    def __init__(self, path: Path | None) -> None:
        """Claim on the bytes of the file at a path; None grants every claim."""
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._bytes = _Bytes(path)

    @contextmanager
    def begin(self) -> Iterator["Claiming"]:
        """Claims of one job. They end with it at the latest."""
        job = Claiming(self)
        try:
            yield job
        finally:
            self._release(job.digests)

    def _take(self, digest: str) -> bool:
        with self._lock:
            if digest in self._held or not self._bytes.set(digest, fcntl.F_WRLCK):
                return False
            self._held.add(digest)
            return True

    def _release(self, digests: Iterable[str]) -> None:
        with self._lock:
            for digest in self._held.intersection(digests):
                self._bytes.set(digest, fcntl.F_UNLCK)
                self._held.remove(digest)

    def close(self) -> None:
        """End all claims. Safe to call twice."""
        with self._lock:
            self._held.clear()
            self._bytes.close()


class Claiming:
    """The claims of one job of this process; see `Claims.begin`."""

    def __init__(self, claims: Claims) -> None:
        self.digests: set[str] = set()
        self._claims = claims

    def take(self, keys: Iterable[EntryKey]) -> list[bool]:
        """Claim entries. For each, in order, whether no other process and no other job has claimed it."""
        return [self._take(key.digest) for key in keys]

    def release(self, keys: Iterable[EntryKey]) -> None:
        """End claims of this job."""
        ended = self.digests.intersection(key.digest for key in keys)
        self._claims._release(ended)
        self.digests -= ended

    def _take(self, digest: str) -> bool:
        if self._claims._take(digest):
            self.digests.add(digest)
            return True
        return False


class Leases:
    """Which entries this process reads now. Safe to use from several threads."""

    def __init__(self, path: Path | None) -> None:
        """Lease the bytes of the file at a path; None leases nothing."""
        self._lock = threading.Lock()
        self._path = path
        self._held: Counter[str] = Counter()
        self._bytes = _Bytes(path)

    @contextmanager
    def hold(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep entries from being evicted by any process. An eviction that has begun is waited for: then its entry is a
        miss."""
        deadline = time.monotonic() + EVICTION_S
        taken: list[str] = []
        try:
            for digest in set(digests):
                while not self._take(digest, taken) and time.monotonic() < deadline:
                    time.sleep(PAUSE_S)  # past the deadline whoever evicts it was stopped; it is a miss, now or soon
            yield
        finally:
            with self._lock:
                self._held.subtract(taken)
                for digest in taken:
                    if not self._held[digest]:
                        self._bytes.set(digest, fcntl.F_UNLCK)
                        del self._held[digest]

    def _take(self, digest: str, taken: list[str]) -> bool:
        with self._lock:
            if not self._held[digest] and not self._bytes.set(digest, fcntl.F_RDLCK):
                del self._held[digest]
                return False
            taken.append(digest)
            self._held[digest] += 1
            return True

    @contextmanager
    def evicting(self) -> Iterator["Evicting"]:
        """Take entries that nobody reads, until the block is left."""
        job = Evicting(self._path)
        try:
            yield job
        finally:
            job.close()

    def close(self) -> None:
        """End all leases. Safe to call twice."""
        with self._lock:
            self._bytes.close()


class Evicting(_Bytes):
    """Entries that are being evicted; see `Leases.evicting`."""

    def take(self, digest: str) -> bool:
        """Whether nobody reads the entry, in this process or another. Nobody can lease it then."""
        return self.set(digest, fcntl.F_WRLCK)
