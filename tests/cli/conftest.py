"""`cli`: a command line in this process, over a store of its own; `child`: the same as a process."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from braidsdk.cli.app import app

BRAID = str(Path(sys.executable).with_name("braid"))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """stdout, which is one JSON document and nothing else."""
        return json.loads(self.stdout)


Cli = Callable[..., Ended]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two documents, a system prompt, and no setting of the user's."""
    for name in [name for name in os.environ if name.startswith("BRAID_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "rules.txt").write_text("You answer questions from the documents.\n")
    (folder / "aistonia.txt").write_text("The capital of Aistonia is Flubarg.\n")
    (folder / "belmora.txt").write_text("The capital of Belmora is Plonk.\n")
    monkeypatch.setenv("BRAID_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("BRAID_DEVICE", "cpu")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cli(files: Path) -> Cli:
    """Runs a command in this process and checks its exit code."""

    def run(*arguments: str, stdin: str | bytes = "", code: int = 0) -> Ended:
        result = CliRunner().invoke(app, arguments, input=stdin)
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr or "--debug" in arguments
        return Ended(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def child(files: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command as a process with pipes."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # Python then takes a write to a closed pipe for a good one
    with ExitStack() as started:

        def start(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = subprocess.Popen([BRAID, *arguments], text=True, **{**pipes, **settings})
            started.enter_context(process)
            started.callback(process.kill)  # of one that has ended it is harmless
            return process

        yield start


class Terminal:
    """A terminal on which one command runs."""

    def __init__(self, start: Callable[..., subprocess.Popen[str]], *arguments: str, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        env = {**kept, "COLUMNS": "50", "TERM": "xterm", **env}
        self._process = start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        self.shown = ""

    def answer(self, prompt: str, typed: str) -> None:
        """Wait for a prompt that was not answered yet, then type."""
        while prompt not in self.shown[self._answered :]:
            assert self._read(), self.shown
        self._answered = len(self.shown)
        if typed:
            os.write(self._ours, typed.encode())

    def interrupt(self, prompt: str) -> None:
        """Wait for a prompt that was not answered yet, then do what Ctrl-C does."""
        self.answer(prompt, "")
        time.sleep(0.3)  # between writing a prompt and waiting for a line, readline misses a signal
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Wait for the end; the exit code, and all that was shown."""
        while self._read():
            pass
        os.close(self._ours)
        return self._process.wait(timeout=60), self.shown

    _answered = 0

    def _read(self) -> bool:
        ready, _, _ = select.select([self._ours], [], [], 30)
        assert ready, f"nothing within 30 s after: {self.shown}"
        try:
            block = os.read(self._ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.shown += block.decode().replace("\r\n", "\n")
        return bool(block)


@pytest.fixture
def terminal(child: Callable[..., subprocess.Popen[str]]) -> Callable[..., Terminal]:
    """Starts a command on a terminal 50 characters wide."""
    return lambda *arguments, **env: Terminal(child, *arguments, **env)


@pytest.fixture
def random_model(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    """The random checkpoint instead of braid-tiny: it has no world of its own, and its answers go on for ever."""
    monkeypatch.setenv("BRAID_MODEL", str(random_checkpoint))
