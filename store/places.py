"""Says where a store's index lies: in the store's folder, or, for a store on a network file system, in a local one.

SQLite needs locks that work, and those of network file systems often don't. Files of chunks and entries need none: they
are written beside their places and renamed.
"""

import hashlib
import json
import os
import re
import socket
from pathlib import Path

from braidsdk.errors import StorePathError

NETWORK = re.compile(
    r"nfs[0-9]?|cifs|smb[0-9]?|smbfs|9p|afs|ncpfs|fuse\.(sshfs|s3fs|rclone|gcsfuse|glusterfs|curlftpfs)"
)
"""Types of file systems whose locks SQLite can't trust."""

MOUNTS = Path("/proc/self/mountinfo")

MARKER = "index.json"
"""The file in a store's folder that says where its index is, if it is elsewhere."""


def home_of(root: Path, index: str | Path | None) -> Path:
    """The folder of a store's index and its locks.

    Args:
        root: the store's folder, absolute.
        index: the folder in which indexes are kept; each store has one of its own in it. None is the store's own.

    Raises:
        StorePathError: the store is on a network file system and `index` is None or is on one too; or its index is
            somewhere else.
    """
    home = root
    if index is not None:
        name = f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
        home = Path(index).expanduser().absolute() / name
    kept = _kept(root)
    if kept is not None and kept != _mark(home):
        raise StorePathError(
            f"The index of the store at {root} must be opened where it is: {kept.get('index')} on "
            f"{kept.get('host')}; got {home} on {socket.gethostname()}. Open it there with the same index folder. If "
            f"it is lost, delete {root / MARKER}: the next open rebuilds it from the files."
        )
    if index is not None and kept is None and (root / "index.db").exists():
        raise StorePathError(
            f"The index of the store at {root} must be where it was made: in the store's folder. Leave the index "
            "folder out (index=None, no BRAID_INDEX), or move index.db away: then it is rebuilt in the index folder."
        )
    if (kind := network_file_system(home)) and os.access(_nearest(home), os.W_OK):
        raise StorePathError(
            f"A store's index must be on a local file system, because SQLite needs locks that work; {home} is on "
            f"{kind}. Choose a local folder for the store, or one for its index alone: ChunkStore(..., index=FOLDER), "
            "or the environment variable BRAID_INDEX."
        )
    return home


def mark(root: Path, home: Path) -> None:
    """Remember in a store's folder that its index is elsewhere, so that no other machine makes another one: its files
    would be strays there, and removed."""
    path = root / MARKER
    if home == root or path.exists():
        return
    new = root / f"{MARKER}.{os.getpid()}"
    descriptor = os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(_mark(home), indent=1) + "\n")
        file.flush()
        os.fsync(descriptor)
    new.replace(path)


def network_file_system(path: Path) -> str | None:
    """The type of the network file system that a path is on, whether it exists or not; None if it is on none."""
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None  # no Linux
    there = os.path.realpath(_nearest(path))
    best, kind = "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, types = before.split(" "), after.split(" ")
        if len(fields) < 5 or not types[0]:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        inside = there == point or there.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two at one place the later one covers the earlier one
            best, kind = point, types[0]
    return kind if NETWORK.fullmatch(kind) else None


def _nearest(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _mark(home: Path) -> dict[str, str]:
    return {"index": str(home), "host": socket.gethostname()}


def _kept(root: Path) -> dict[str, str] | None:
    try:
        text = (root / MARKER).read_text(errors="replace")
    except (OSError, ValueError):
        return None  # there is none, or nothing can be read here: whoever opens the store says so
    try:
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    except (ValueError, RecursionError):
        return {}
