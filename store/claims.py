"""Says which entries a process computes, so that no other process computes them too.

A claim is a lock of one byte of a file, at the place that the entry's digest names. It belongs to the open file, so it
ends with its process, however that ends; nothing is left to collect, and no clock is read. Where there are no such
locks every claim is granted: then entries are computed more than once, and stored once.
"""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from braidsdk.store.keys import EntryKey

_FLOCK = "hhqqi4x"
"""C's `struct flock`: type, whence, start, length, process."""


class Claims:
    """This process's claims on entries. Safe to use from several threads, which have claims against each other too."""

    def __init__(self, path: Path | None) -> None:
        """Claim on the bytes of the file at a path; None grants every claim."""
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._file: int | None = None
        if path is not None and hasattr(fcntl, "F_OFD_SETLK"):
            self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

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
            if digest in self._held or not self._set(digest, fcntl.F_WRLCK):
                return False
            self._held.add(digest)
            return True

    def _release(self, digests: Iterable[str]) -> None:
        with self._lock:
            for digest in self._held.intersection(digests):
                self._set(digest, fcntl.F_UNLCK)
                self._held.remove(digest)

    def close(self) -> None:
        """End all claims. Safe to call twice."""
        with self._lock:
            descriptor, self._file = self._file, None
            self._held.clear()
            if descriptor is not None:
                os.close(descriptor)

    def _set(self, digest: str, kind: int) -> bool:
        """Whether the entry's byte could be locked or unlocked. Digests share bytes so rarely that it does not matter:
        the second one waits."""
        if self._file is None:
            return True
        try:
            fcntl.fcntl(
                self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, int(digest[:15], 16), 1, 0)
            )
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True


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
