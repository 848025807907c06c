"""Compiled code kept on disk: read only from where nobody but the user and root could have put it, and loaded as read.

Which folder is safe. Symlinks are resolved first. The real path is then opened step by step from the root: each folder
relative to the one before, following no link, and what was opened is what is checked. So nothing that is swapped
meanwhile leads elsewhere. Whoever can bend a symlink can only choose another folder that passes the same checks.

Every folder on the way must belong to the user or to root, and nobody else may write to it. (An access control list
that lets others write shows in the bits of the group.) Sticky folders, such as /tmp, are the exception. Others can
create entries there, but rename or remove only their own. So what is below is safe if it belongs to the user or to
root, and that is checked of every folder. If somebody else creates it first, it is theirs, and is refused. The last
folder may not be sticky: others could put files into it. In a user namespace that does not map root, what is root's
seems to belong to nobody, and is refused.

What is loaded. A file is opened without following a link, then checked and read through its descriptor. What was read
goes into a file in memory, which is sealed against any change, and the linker loads that one. It could not load the
descriptor of the file on disk as safely: the user's other processes may write to that file while it is mapped.
"""

import ctypes
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

_DIGEST_BYTES = hashlib.sha256().digest_size
_numbers = count(1)


@dataclass(frozen=True)
class Folder:
    """A folder that only the user and root can change. Nor can others change what its path leads to."""

    path: Path
    descriptor: int


@contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """A folder, checked together with all above it. What is missing is created, for the user alone.

    Raises:
        RuntimeError: others could change what lies there.
        OSError: it can't be opened or created.
    """
    real = Path(os.path.realpath(path))
    with ExitStack() as stack:
        descriptor = None
        for step in (*reversed(real.parents), real):
            descriptor = _enter(step, descriptor)
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            sticky = status.st_mode & stat.S_ISVTX and step != real
            _refuse(step, _written_by_others(status, allowed=0o022 if sticky else 0), "")
        assert descriptor is not None
        yield Folder(real, descriptor)


def _enter(step: Path, above: int | None) -> int:
    name, flags = step.name or step.root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=above)
    except FileNotFoundError:
        with suppress(FileExistsError):  # somebody was quicker
            os.mkdir(name, 0o700, dir_fd=above)
        return os.open(name, flags, dir_fd=above)


def read(folder: Folder, name: str) -> bytes | None:
    """The code that is kept under a name; None if there is none, or not all of it.

    Raises:
        RuntimeError: others could have written it.
        OSError: it can't be read.
    """
    try:  # a FIFO would wait for its writer
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder.descriptor)
    except FileNotFoundError:
        return None
    with os.fdopen(file, "rb") as stream:
        status = os.fstat(file)
        trouble = _written_by_others(status)
        if not stat.S_ISREG(status.st_mode):
            trouble = "it is not a regular file"
        elif status.st_nlink != 1:
            trouble = f"it has {status.st_nlink} names"
        _refuse(folder.path / name, trouble, "delete it, or ")
        kept = stream.read()
    code, digest = kept[:-_DIGEST_BYTES], kept[-_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def write(folder: Folder, name: str, code: bytes) -> None:
    """Keep code under a name, at once, whoever else writes it meanwhile.

    Raises:
        OSError: it can't be written.
    """
    with TemporaryDirectory(dir=folder.path) as scratch:
        file = Path(scratch) / name
        file.touch(0o600)
        file.write_bytes(code + hashlib.sha256(code).digest())
        file.replace(folder.path / name)


def load(name: str, code: bytes) -> ctypes.CDLL:
    """The functions of a shared library. Its name shows in /proc/self/maps.

    Raises:
        RuntimeError: Linux does not let this process run code from memory, or it is no library.
    """
    try:
        memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(memory, "wb", closefd=False) as stream:  # sanitizers read symbols from it, whenever they report
            stream.write(code)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        # The linker takes a path that it knows for the library that it knows, and the number of a descriptor that a
        # daemon closed is used again. So each path is its own: slashes make it so.
        return ctypes.CDLL(f"/proc/self/fd{'/' * next(_numbers)}{memory}")
    except OSError as error:
        raise RuntimeError(
            f"compiled C kernels can't be loaded from a file in memory ({error}); the sandbox, or Linux's setting "
            f"vm.memfd_noexec, must allow it"
        ) from error


def _written_by_others(status: os.stat_result, allowed: int = 0) -> str | None:
    """How somebody else than the user and root could write to it, whatever the `allowed` bits of its mode are."""
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & 0o022 & ~allowed:
        return f"its mode is {stat.filemode(status.st_mode)}; `chmod go-w` mends that"
    return None


def _refuse(path: Path, trouble: str | None, remedy: str) -> None:
    if trouble:
        raise RuntimeError(
            f"others could write to {path} ({trouble}), and compiled C kernels are kept there or below; {remedy}set "
            f"XDG_CACHE_HOME to your own folder"
        )
