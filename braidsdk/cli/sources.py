"""Reads the texts for `braid add` from files, folders, globs and stdin, each with the name that it will have.

A file is named by its file name. A file from a folder or a glob is named by its path from there. Knows nothing about
stores or models.
"""

import fnmatch
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braidsdk.cli.exits import NotFoundError
from braidsdk.cli.select import is_glob
from braidsdk.errors import InputError

STDIN = "-"

_TEXT_SUFFIX = re.compile(
    r"\.(txt|text|md|markdown|mdx|rst|adoc|asciidoc|org|tex|textile|wiki|log|srt|vtt"
    r"|csv|tsv|json|jsonl|ndjson|ya?ml|toml|ini|cfg|conf|xml|html?"
    r"|pyi?|m?js|ts|[jt]sx|java|kt|scala|c|h|cc|cpp|hpp|cs|go|rs|swift|rb|php|pl|lua|r|jl|sh|bash|zsh|sql|proto|css)",
    re.IGNORECASE,
)
"""Suffixes of files that are taken from a folder, unless `--glob` says otherwise."""

_BINARY_WITHIN = 8_192  # a file with a zero among this many first bytes is binary, as in git


@dataclass(frozen=True)
class Source:
    """One text that was read.

    Attributes:
        name: the name of its chunk; None for stdin.
        path: the absolute path of the file; None for stdin.
        text: its content, with "\\n" as line end.
    """

    name: str | None
    path: Path | None
    text: str


@dataclass(frozen=True)
class Unread:
    """A file that was left out, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """Everything that was read.

    Attributes:
        sources: texts in the order of the arguments. A folder's own files come before those of its folders, by name.
        unread: files that hold no text.
        folders: absolute paths of the folders that were given. Files that were read from them earlier may be gone.
    """

    sources: tuple[Source, ...]
    unread: tuple[Unread, ...]
    folders: tuple[Path, ...]


def read_sources(arguments: Sequence[str], globs: Sequence[str]) -> Reading:
    """Read what the arguments name.

    Args:
        arguments: files, folders, globs, or `-` for stdin.
        globs: which files to take from folders, by name or, if the glob has a slash, by path from the folder. Without
            globs, files with a suffix of text or source code are taken. Hidden files and folders are left out.

    Raises:
        NotFoundError: a file does not exist, or no file matches a glob.
        InputError: two files would have the same name.
    """
    sources: list[Source] = []
    unread: list[Unread] = []
    folders: list[Path] = []
    for argument in dict.fromkeys(arguments):
        path = Path(argument).expanduser()
        if argument == STDIN:
            found = [_decode(sys.stdin.buffer.read(), "stdin", None, None)]
        elif path.is_dir():
            folders.append(path.resolve())
            found = _read_folder(path, globs)
        elif path.exists():
            found = [_read_file(path, path.name)]
        elif is_glob(argument):
            base, files = _expand(path)
            found = [_read_file(file, file.relative_to(base).as_posix()) for file in files]
        else:
            raise NotFoundError(f"{argument} can't be read: there is no such file. Check the path.")
        sources += [each for each in found if isinstance(each, Source)]
        unread += [each for each in found if isinstance(each, Unread)]
    once = list({source.path or index: source for index, source in enumerate(sources)}.values())
    _check_names(once)
    return Reading(tuple(once), tuple(unread), tuple(folders))


def _read_folder(folder: Path, globs: Sequence[str]) -> list[Source | Unread]:
    """The files of a folder that are wanted. A pipe that is given by itself is read; one that lies in a folder is left
    out, because it would be waited for."""
    found: list[Source | Unread] = []
    for path in _walk(folder, globs, lambda error: found.append(_unreadable(error.filename, error))):
        name = path.relative_to(folder).as_posix()
        found.append(Unread(str(path), "is no regular file") if _is_special(path) else _read_file(path, name))
    return found


def _walk(folder: Path, globs: Sequence[str], on_error: Callable[[OSError], None]) -> Iterator[Path]:
    for where, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(where) / name
            if not name.startswith(".") and _is_wanted(path.relative_to(folder), globs):
                yield path


def _is_wanted(path: Path, globs: Sequence[str]) -> bool:
    if not globs:
        return _TEXT_SUFFIX.fullmatch(path.suffix) is not None
    return any(fnmatch.fnmatchcase(path.as_posix() if "/" in each else path.name, each) for each in globs)


def _expand(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder that a glob looks in (its parts before the first one with a wildcard), and the files that match."""
    split = next(index for index, part in enumerate(pattern.parts) if is_glob(part))
    base = Path(*pattern.parts[:split])
    fitting = sorted(base.glob(str(Path(*pattern.parts[split:]))))
    files = [path for path in fitting if path.is_file() and not _is_hidden(path.relative_to(base))]
    if not files:
        raise NotFoundError(f"No file matches {str(pattern)!r}. Check the pattern; `**` matches any number of folders.")
    return base, files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path, name: str) -> Source | Unread:
    try:
        name.encode()
    except UnicodeEncodeError:
        return Unread(ascii(str(path)), "has a name that is not UTF-8")
    try:
        return _decode(path.read_bytes(), str(path), name, path.resolve())
    except OSError as error:
        return _unreadable(path, error)


def _unreadable(path: object, error: OSError) -> Unread:
    return Unread(str(path), f"can't be read: {error.strerror}")


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe, a socket or a device."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False  # reading it says what is wrong


def _decode(content: bytes, shown: str, name: str | None, path: Path | None) -> Source | Unread:
    if b"\0" in content[:_BINARY_WITHIN]:
        return Unread(shown, "is binary")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Unread(shown, "is not UTF-8 text")
    if not text.strip():
        return Unread(shown, "is empty")
    return Source(name, path, text.replace("\r\n", "\n").replace("\r", "\n"))


def _check_names(sources: Iterable[Source]) -> None:
    known: dict[str, Path | None] = {}
    for source in sources:
        if source.name is None:
            continue
        if source.name in known:
            raise InputError(
                f"Each file must have a name of its own; {known[source.name]} and {source.path} both have the name "
                f"{source.name!r}. Pass the folder that holds both: its files are named by their path in it."
            )
        known[source.name] = source.path
