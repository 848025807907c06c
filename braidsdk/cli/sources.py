"""What `braid add` reads: files, folders, globs and stdin, each text with the name that it will have.

A file is named by its file name; one out of a folder or a glob by its path from there. Knows nothing of stores or
models.
"""

import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
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
"""What is taken for text in a folder, unless `--glob` says otherwise."""

_BINARY_WITHIN = 8_192  # bytes looked through for a zero, as git does


@dataclass(frozen=True)
class Source:
    """One text that was read.

    Attributes:
        name: what its chunk is to be called; None for stdin.
        path: the file, absolute; None for stdin.
        text: its content, line ends as "\\n".
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
    """All that was read.

    Attributes:
        sources: in the order of the arguments; a folder's own files before those of its folders, each by name.
        unread: files that hold no text.
        folders: the folders that were given, absolute: what was read from one of them may be gone there.
    """

    sources: tuple[Source, ...]
    unread: tuple[Unread, ...]
    folders: tuple[Path, ...]


def read_sources(arguments: Sequence[str], globs: Sequence[str]) -> Reading:
    """Read what the arguments name.

    Args:
        arguments: files, folders, globs, or `-` for stdin.
        globs: which files to take from folders, by name or, with a slash in it, by path from the folder; none takes
            those whose suffix is one of text or source code. Hidden files and folders are left out.

    Raises:
        NotFoundError: a file is not there, or a glob fits none.
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
            found = [_read_file(file, file.relative_to(path).as_posix()) for file in _walk(path, globs)]
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


def _walk(folder: Path, globs: Sequence[str]) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
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
    """The folder that a glob looks in, its parts before the first with a wildcard; and the files that fit."""
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
        return Unread(str(path), f"can't be read: {error.strerror}")


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
                f"Two files have the name {source.name!r}: {known[source.name]} and {source.path}. Pass the folder "
                "that holds both: its files are named by their path in it."
            )
        known[source.name] = source.path
