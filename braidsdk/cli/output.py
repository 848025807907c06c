"""What a command prints: data on stdout, and everything else on stderr.

On a terminal, tables fit its width. Otherwise each row is a line with tabs between its cells, so that `cut`, `grep` and
`while read` can read it. With `--json`, stdout is one JSON document.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from braidsdk import Answer


@dataclass(frozen=True)
class Output:
    """How one command reports.

    Attributes:
        json: print JSON instead of words.
        quiet: leave out notes, warnings and progress.
        debug: show tracebacks.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    def document(self, value: object) -> None:
        """Print one JSON document."""
        self.text(json.dumps(value, indent=2, ensure_ascii=not prints_unicode(sys.stdout)))

    def json_line(self, value: object) -> None:
        """Print one document of a series at once, on its own line."""
        self.text(json.dumps(value, ensure_ascii=not prints_unicode(sys.stdout)))
        sys.stdout.flush()

    def text(self, text: str, end: str = "\n") -> None:
        """Print text as it is."""
        sys.stdout.write(text + end)

    def piece(self, text: str) -> None:
        """Print a piece of an answer at once. More pieces may follow."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, fill: int | None = None) -> None:
        """Print rows under the names of their columns. On a terminal the column `fill` is cut to the width that is
        left."""
        cells = [[one_line(cell) for cell in row] for row in rows]
        if not sys.stdout.isatty():
            for row in cells:
                self.text("\t".join(row))
            return
        console = Console()
        table = Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)
        widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
        for row in cells:
            texts = list(map(Text, row))
            if fill is not None:
                room = console.width - sum(widths) + widths[fill] - 2 * (len(widths) - 1)
                texts[fill].truncate(max(room, 8), overflow="ellipsis")
            table.add_row(*texts)
        console.print(table)

    def note(self, text: str) -> None:
        """Print a note on stderr, unless the command is quiet."""
        if not self.quiet:
            _stderr(text)

    def say(self, text: str) -> None:
        """Print what was asked for on stderr, even if the command is quiet."""
        _stderr(text)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, unless the command is quiet."""
        self.note(f"braid: warning: {text}")

    def error(self, text: str) -> None:
        """Print an error on stderr."""
        _stderr(f"braid: {text}")

    @property
    def shows_progress(self) -> bool:
        """Whether a progress bar is wanted, and there is a terminal to show it on."""
        return not self.quiet and sys.stderr.isatty()


def as_json(answer: "Answer") -> dict[str, object]:
    """An answer as JSON. Its sources are there if they were asked for, each with its chunk's id and name."""
    document = asdict(replace(answer, sources=None))
    if answer.sources is None:
        del document["sources"], document["token_sources"]
    else:
        document["sources"] = [
            {"id": source.chunk.id, "name": source.chunk.name, "share": source.share} for source in answer.sources
        ]
    return document


def one_line(text: str) -> str:
    """Text without line ends, tabs and control characters, which is safe in a row and on a terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def counted(count: int, one: str, many: str = "") -> str:
    """A number and what it counts: "1 chunk", "2,000 chunks". `many` is the plural if it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def ask_yes_no(question: str, *, read: Callable[[], str] | None = None) -> bool:
    """Ask on stderr. Every answer except "y" and "yes" means no."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return (read or sys.stdin.readline)().strip().lower() in ("y", "yes")


def _stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def prints_unicode(stream: TextIO) -> bool:
    """Whether a stream's encoding has all characters."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")
