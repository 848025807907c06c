"""Record the terminal sessions of `docs/session.md`: run the commands of its console blocks, and keep what they print.

A line after "$ " is a command of the shell. A line after "> " is typed into the command that runs. All blocks share one
folder, which is empty at first and is shown as "~". Text around the blocks stays as it is.

python docs/record_session.py
"""

import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
from collections.abc import Sequence
from pathlib import Path
from select import select
from time import monotonic

PAGE = Path(__file__).resolve().parent / "session.md"
COLUMNS, ROWS = 100, 40
LIMIT_S = 120.0
"""How many seconds one command may take."""

_BLOCK = re.compile(r"(```console\n)(.*?)(```)", re.DOTALL)


def recorded(page: str) -> str:
    """The page with the outputs of a run in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder))
        fresh = _BLOCK.sub(lambda block: f"{block[1]}{shell.replay(block[2])}{block[3]}", page)
    return re.sub(r" +$", "", fresh.replace(str(shell.folder), "~"), flags=re.MULTILINE)


class Shell:
    """Runs commands one after another on a terminal, in one folder. `export` lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._exports: list[str] = []
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("BRAID_")} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "BRAID_DEVICE": "cpu",
            "COLUMNS": str(COLUMNS),
            "LINES": str(ROWS),
            "TERM": "dumb",  # no colours, no bars that draw over themselves
        }

    def replay(self, block: str) -> str:
        """A block's commands with what they print now."""
        out = ""
        commands = [part.splitlines() for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
        for command, *lines in commands:
            typed = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
            out += f"$ {command}\n{self.run(command, typed)}"
        return out

    def run(self, command: str, typed: Sequence[str] = ()) -> str:
        """What the terminal shows of a command: its output, its prompts and what is typed at them.

        Raises:
            TimeoutError: it did not end in time.
        """
        if command.startswith("export "):
            self._exports.append(command)
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (ROWS, COLUMNS))
        script = "\n".join([*self._exports, command])
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self._environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            return _converse(ours, list(typed))
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def _converse(terminal: int, typed: list[str]) -> str:
    """Read a terminal to its end; type the next line whenever a prompt waits for one."""
    seen, until = b"", monotonic() + LIMIT_S
    while True:
        if not select([terminal], [], [], max(0.0, until - monotonic()))[0]:
            raise TimeoutError(f"not done after {LIMIT_S:g} s; its last output: {seen[-300:]!r}")
        try:
            more = os.read(terminal, 65536)
        except OSError:  # on Linux this means that the other end is closed
            more = b""
        if not more:
            return seen.decode().replace("\r\n", "\n")
        seen += more
        if typed and re.search(rb"(^|\n)> $", seen):
            os.write(terminal, f"{typed.pop(0)}\n".encode())


def without_times(page: str) -> str:
    """The page with times, rates and free space masked, for comparing two runs."""
    return re.sub(r" +[\d.,]+ (ms\b|s\b|tokens/s|[kMGT]?B(?:/s| free))", r" # \1", page)


if __name__ == "__main__":
    PAGE.write_text(recorded(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
