"""What a power cut may leave of a folder, from the record of all changes to its files that `recorder.c` writes.

A disk is only sure to keep what was synced. Each sector of a file may be as it was at any time since the file's last
sync, and the file may have a new size without the data. Each name in a folder may stand for what it stood for at any
time since the folder's last sync, whatever the other names do. So a file whose folder was not synced may be missing.
"""

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("<cQQQIII")

KINDS = ("nothing", "everything", "names", "data", "writes", "sectors", "blocks")
"""What is left of all that was not synced: nothing; everything; the names and sizes without data; the data without new
names; some writes; some sectors of 512 bytes; some blocks of 4 KiB. Of the last three some of the names are left."""

_UNITS = {"sectors": 512, "blocks": 4096}


class Record(NamedTuple):
    """One call: a kind, the file's inode, place and size, one or two paths or a text, and data."""

    kind: str
    inode: int
    place: int
    size: int
    path: str
    to: str
    data: bytes


@dataclass(eq=False)
class File:
    """A file's content when it was last synced, and what was done since: writes, and new sizes with data None."""

    synced: bytes = b""
    since: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        self.synced, self.since = self._with(self.since), []

    def left(self, kind: str, random: random.Random) -> bytes:
        """What a power cut leaves."""
        if kind == "nothing" or not self.since:
            return self.synced
        everything = self._with(self.since)
        if kind in ("everything", "data"):
            return everything
        if kind == "names":
            return self.synced[: len(everything)].ljust(len(everything), b"\0")
        was = [self._with(self.since[:count]) for count in range(len(self.since) + 1)]
        longest = max(map(len, was))
        size = random.choice([*map(len, was), random.randint(len(self.synced), longest)])  # it may have grown partly
        if kind == "writes":
            return self._with([each for each in self.since if random.random() < 0.5])[:size].ljust(size, b"\0")
        unit, content = _UNITS[kind], bytearray(size)
        for begin in range(0, size, unit):
            part = random.choice(was)[begin : min(begin + unit, size)]
            content[begin : begin + len(part)] = part
        return bytes(content)

    def _with(self, changes: list[tuple[int, bytes | None]]) -> bytes:
        content = bytearray(self.synced)
        for place, data in changes:
            size = place if data is None else max(len(content), place + len(data))
            content = content[:size].ljust(size, b"\0")
            if data is not None:
                content[place : place + len(data)] = data
        return bytes(content)


@dataclass(eq=False)
class Folder:
    """What a folder's names stood for when it was last synced, what was done since, and what they stand for."""

    synced: "dict[str, File | Folder]" = field(default_factory=dict)
    since: "list[tuple[str, File | Folder | None]]" = field(default_factory=list)
    names: "dict[str, File | Folder]" = field(default_factory=dict)

    def set(self, name: str, to: "File | Folder | None") -> None:
        self.since.append((name, to))
        self.names.pop(name, None)
        if to is not None:
            self.names[name] = to

    def sync(self) -> None:
        self.synced, self.since = dict(self.names), []

    def left(self, kind: str, random: random.Random) -> "dict[str, File | Folder]":
        """What a power cut leaves."""
        if kind in ("nothing", "data"):
            return self.synced
        if kind in ("everything", "names"):
            return self.names
        stood: dict[str, list[File | Folder | None]] = {}
        for name, to in self.since:
            stood.setdefault(name, [self.synced.get(name)]).append(to)
        found = {**self.synced, **{name: random.choice(each) for name, each in stood.items()}}
        return {name: to for name, to in found.items() if to is not None}


class Disk:
    """The folder that is watched, and all that was ever in it. The folder itself is there from the start."""

    def __init__(self, top: Path) -> None:
        self._top, self.folder = str(top), Folder()
        self._nodes: dict[int, File | Folder] = {top.stat().st_ino: self.folder}

    def apply(self, record: Record) -> None:
        """Do what was recorded."""
        if record.kind == "c":
            self._create(record, File())
        elif record.kind == "d":
            self._create(record, Folder())
        elif record.kind == "s":
            self._nodes[record.inode].sync()
        elif record.kind in "wt":
            file = self._nodes[record.inode]
            assert isinstance(file, File)
            file.since.append((record.place, record.data) if record.kind == "w" else (record.size, None))
        elif record.kind in "rlu":
            folder, name = self._parent(record.path)
            node = folder.names[name]
            if record.to:
                to, new = self._parent(record.to)
                to.set(new, node)
            if record.kind != "l":
                folder.set(name, None)

    def left(self, to: Path, kind: str, random: random.Random) -> None:
        """Write what a power cut leaves to an empty folder."""
        self._leave(self.folder, to, kind, random, {})

    def _leave(
        self, folder: Folder, to: Path, kind: str, random: random.Random, written: "dict[File | Folder, Path]"
    ) -> None:
        for name, node in folder.left(kind, random).items():
            path = to / name
            if node in written:
                os.link(written[node], path)
            elif isinstance(node, Folder):
                path.mkdir()
                self._leave(node, path, kind, random, written)
            else:
                written[node] = path
                path.write_bytes(node.left(kind, random))

    def _create(self, record: Record, node: File | Folder) -> None:
        folder, name = self._parent(record.path)
        if name not in folder.names:
            self._nodes[record.inode] = node
            folder.set(name, node)

    def _parent(self, path: str) -> tuple[Folder, str]:
        folder: File | Folder = self.folder
        *parents, name = os.path.relpath(path, self._top).split("/")
        for each in parents:
            assert isinstance(folder, Folder)
            folder = folder.names[each]
        assert isinstance(folder, Folder)
        return folder, name


def read_log(path: Path) -> Iterator[Record]:
    """All calls, in their order."""
    with path.open("rb") as file:
        while head := file.read(_HEAD.size):
            kind, inode, place, size, path_size, to_size, data_size = _HEAD.unpack(head)
            texts = [os.fsdecode(file.read(each)) for each in (path_size, to_size)]
            yield Record(kind.decode(), inode, place, size, *texts, file.read(data_size))


def content_of(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder with their content, and its folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
