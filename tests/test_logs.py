"""Logs: silent until someone listens, by `BRAID_LOG` or by `logging`; counts and times, never text or names."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from braidsdk import Braid, logs
from braidsdk.errors import StoreError
from braidsdk.store import ChunkStore
from braidsdk.testing import FakeBraid

ROOT = Path(__file__).resolve().parent.parent

USE = """
from braidsdk.testing import FakeBraid
with FakeBraid(pool_bytes=20_000) as braid:
    rules = braid.register_system("private rules", name="private-name")
    texts = [*(f"private text {n}" for n in range(9)), ""]
    many = braid.register_many(texts, anchor=rules, on_error="skip", progress=False)
    for each in many:
        braid.ask("private question?", chunks=[rules, each])
"""


def child(level: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "BRAID_LOG"}
    if level is not None:
        environment["BRAID_LOG"] = level
    return subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=True)


def test_it_is_quiet_until_it_is_asked() -> None:
    done = child(None)
    assert (done.stdout, done.stderr) == ("", "")


def test_braid_log_sends_lines_to_stderr_and_none_holds_text_or_names() -> None:
    done = child("DEBUG")
    assert done.stdout == ""
    for said in (
        "published ",
        "computed ",
        "skipped text 9: EmptyTextError",
        "evicted an entry of ",
        "registering ",
    ):
        assert said in done.stderr
    assert "private" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def untouched() -> object:
    """The logger, put back afterwards."""
    logger = logs.logger
    before = (list(logger.handlers), logger.level)
    yield logger
    logger.handlers[:], level = before
    logger.setLevel(level)


def test_a_level_is_set_once(untouched: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(untouched.handlers)
    monkeypatch.setenv("BRAID_LOG", " Info ")
    logs.configure()
    logs.configure()
    assert len(untouched.handlers) == count + 1
    assert untouched.level == logging.INFO


def test_an_unknown_level_is_named(untouched: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_LOG", "inof")
    with pytest.warns(UserWarning, match=r"must be one of debug, info.*got 'inof'.*Did you mean 'info'"):
        logs.configure()


def test_the_packages_logger_has_no_handler_that_speaks() -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("braidsdk").handlers)


def test_what_is_loaded_is_logged_with_counts(
    random_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        rules = braid.register_system("private rules", name="private-name")
    caplog.set_level(logging.DEBUG, "braidsdk")
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        tokens = len(braid.compose([rules]).input_ids)
        braid.ask("private question", chunks=[rules], max_new_tokens=1)
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("opened a model of 3 layers in ") for line in lines)
    assert any(line.startswith(f"loaded 1 entries, {tokens * 1536} bytes in ") for line in lines)
    assert "private" not in caplog.text


def test_counts_that_could_not_be_kept_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    braid = FakeBraid()
    braid.ask("Well?", chunks=[braid.register("text")])
    monkeypatch.setattr(ChunkStore, "remember", failing)
    braid.close()
    assert "counts and rates were not kept: StoreError" in caplog.text


def failing(*_: object, **__: object) -> None:
    raise StoreError("out of luck")


def test_nothing_prints() -> None:
    for path in (ROOT / "braidsdk").glob("*.py"):
        assert "print(" not in path.read_text().replace("    print(braid.ask(", ""), path  # the package's own example
