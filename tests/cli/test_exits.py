"""Every exit code, and that errors are a sentence: no traceback without `--debug`."""

import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk import errors
from braidsdk.cli import exits
from braidsdk.cli.exits import code_of
from braidsdk.store import ChunkStore

Cli = Callable[..., Any]


def classes(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(each for sub in kind.__subclasses__() for each in classes(sub))]


def test_every_error_has_a_code() -> None:
    expected = {
        **dict.fromkeys(classes(errors.BraidError), 1),
        **dict.fromkeys(classes(errors.InputError), 2),
        **dict.fromkeys(classes(errors.ModelNotFoundError), 3),
        errors.UnknownChunkError: 3,
        exits.NotFoundError: 3,
        errors.StoreVersionError: 4,
        errors.StoreCorruptError: 4,
        errors.ArchiveError: 4,
        errors.UnsupportedModelError: 4,
        errors.WeightsError: 4,
        errors.WindowExceededError: 1,
        errors.NameTakenError: 1,
    }
    got = {kind: code_of(kind("x")) for kind in classes(errors.BraidError) if kind.__module__.startswith("braidsdk")}
    assert got == {kind: code for kind, code in expected.items() if kind in got}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ls", "--limit", "0"], 2, "--limit"),
        (["fly"], 2, "No such command"),
        (["stat"], 2, "Did you mean 'stats'"),
        (["ask"], 2, "question"),
        (["ask", "Who?", "--mode", "exakt"], 2, "exact"),
        (["ask", "Who?", "--device", "tpu"], 2, "device"),
        (["ask", "Who?", "--dtype", "int3"], 2, "dtype"),
        (["ask", "Who?", "--top-p", "7"], 2, "top_p"),
        (["ask", " "], 2, "question"),
        (["ask", "Who?", "-c", "rulez"], 3, "Did you mean 'rules'?"),
        (["ask", "Who?", "-c", "nothing*"], 3, "nothing*"),
        (["ask", "Who?", "--model", "nowhere"], 3, "No checkpoint at 'nowhere'"),
        (["ask", "word " * 9000], 1, "window"),
        (["add", "missing.txt"], 3, "can't be read"),
        (["ask", "Who?", "--model", "other"], 4, "'other_model'"),
        (["ask", "Who?", "--model", "bad"], 4, "weights"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_errors_are_a_line_and_a_code(cli: Cli, files: Path, arguments: list[str], code: int, says: str) -> None:
    cli("add", "--system", "--name", "rules", "rules.txt", "-q")
    (files / "other").mkdir()
    (files / "other" / "config.json").write_text('{"model_type": "other_model"}')
    tiny = Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
    (files / "bad").mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (files / "bad" / path.name).write_bytes(path.read_bytes())
    (files / "bad" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    ended = cli(*arguments, code=code)
    assert says in ended.stderr
    assert ended.stdout == ""


def test_a_damaged_index_and_one_of_a_newer_version_are_incompatible(cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with ChunkStore(store):
        pass
    with sqlite3.connect(store / "index.db") as index:
        index.execute("update _sqlite_migrations set name = 'm999_future' where name = 'm001_tables'")
    index.close()
    assert "m999_future" in cli("ls", code=4).stderr
    for path in store.glob("index.db*"):
        path.unlink()
    (store / "index.db").write_bytes(b"no database" * 1000)
    assert "damaged" in cli("ls", code=4).stderr


def test_debug_shows_a_traceback(cli: Cli) -> None:
    cli("add", "rules.txt", "-q")
    assert "Traceback" in cli("show", "nobody", "--debug", code=3).stderr


def test_what_nobody_foresaw_is_a_sentence_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    cli("add", "rules.txt", "-q")
    monkeypatch.setattr(ChunkStore, "list_chunks", broken)
    assert "ZeroDivisionError: by nothing\nThis error is not expected" in cli("ls", code=1).stderr
    assert "Traceback" in cli("ls", "--debug", code=1).stderr


def test_help_tells_the_codes(cli: Cli) -> None:
    words = " ".join(cli("--help").stdout.split())
    for code, meaning in exits.MEANINGS.items():
        assert f"{code} {meaning}" in words
    assert cli("-h").stdout == cli("--help").stdout
    assert "braid 0." in cli("--version").stdout


def test_ctrl_c_ends_with_130(child: Callable[..., subprocess.Popen[str]]) -> None:
    process = child("chat")
    assert process.stderr is not None
    while "Answers come from" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "braid: interrupted.\n"
