"""Write the reference of the commands in `docs/command-line.md` from the help that typer makes from the code.

python docs/write_commands.py
"""

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "command-line.md"
MARK = "<!-- typer's own help: python docs/write_commands.py writes what follows -->\n"


def reference() -> str:
    """Commands, arguments and options, as Markdown."""
    command = [sys.executable, "-P", "-m", "typer", "braidsdk.cli.app", "utils", "docs", "--name", "braid"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _title, _, commands = made.partition("\n## ")
    return f"## {commands.rstrip()}\n"


def page(text: str) -> str:
    """The page, with everything after the mark written again.

    Raises:
        ValueError: the mark is not there, or is there more than once.
    """
    kept, *rest = text.split(MARK)
    if len(rest) != 1:
        raise ValueError(f"expected one mark {MARK.strip()!r}, found {len(rest)}")
    return f"{kept}{MARK}\n{reference()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
