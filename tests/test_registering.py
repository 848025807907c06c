"""Registering many texts: what is taken, what is skipped, what it will take, how far it is, and being interrupted."""

import datetime
import itertools
import logging
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from braidsdk import Braid, Progress, RegistrationEstimate
from braidsdk.errors import (
    EmptyTextError,
    InputError,
    NameTakenError,
    PoolFullError,
    StoreFullError,
    UnknownChunkError,
    WindowExceededError,
)
from braidsdk.store import ChunkStore
from braidsdk.testing import FakeBraid
from braidsdk.types import MARGIN_BYTES

RULES = "You answer questions from the documents."
TEXTS = [f"Document number {n}. " * (2 + n) for n in range(5)]


@dataclass
class PageDocument:
    """As LangChain's `Document`."""

    page_content: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Node:
    """As LlamaIndex's `TextNode`."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScoredNode:
    """As LlamaIndex's `NodeWithScore`: the node's own fields are its."""

    node: Node
    score: float = 0.5


@pytest.fixture
def fake() -> Any:
    with FakeBraid() as braid:
        yield braid


def test_what_a_retriever_gives_is_registered_as_it_comes(fake: FakeBraid) -> None:
    given = ["plain", PageDocument("page", {"source": "a"}), Node("node", {"source": "b"}), ScoredNode(Node("scored"))]
    chunks = fake.register_many(given, progress=False)
    assert [chunk.text for chunk in chunks] == ["plain", "page", "node", "scored"]
    assert [chunk.metadata for chunk in chunks] == [{}, {"source": "a"}, {"source": "b"}, {}]
    assert chunks.skipped == ()
    again = fake.register_many(given, metadata=[None, {"mine": 1}, None, {"mine": 2}], progress=False)
    assert again == chunks
    assert [chunk.metadata for chunk in again] == [{}, {"mine": 1}, {"source": "b"}, {"mine": 2}]
    assert fake.register(PageDocument("page")).metadata == {"mine": 1}, "an object without metadata takes none away"


def test_what_a_retriever_gives_is_composed_by_its_text(fake: FakeBraid) -> None:
    documents = [PageDocument(" one\n"), ScoredNode(Node("two"))]
    one, two = fake.register_many(documents, progress=False)
    rules = fake.register_system(RULES)
    assert fake.compose([rules, *reversed(documents)]).input_ids == fake.compose([rules, two, one]).input_ids
    with pytest.raises(UnknownChunkError, match=r"this PageDocument must be registered .*register_many first"):
        fake.compose([PageDocument("three")])
    with pytest.raises(EmptyTextError):
        fake.compose([PageDocument(" ")])


def test_metadata_of_a_retriever_that_is_no_json_is_named(fake: FakeBraid) -> None:
    when = PageDocument("page", {"page": 1, "when": datetime.date(2026, 1, 1)})
    with pytest.raises(InputError, match=r"a date under 'when'. Convert it first, for example with str"):
        fake.register_many(["fine", when], progress=False)
    assert len(fake.chunks) == 0
    assert fake.register(when, metadata={"when": "2026"}).metadata == {"when": "2026"}, "what is given stands for it"


def test_bad_texts_are_skipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with FakeBraid(window=200) as braid:
        braid.register("taken", name="secret-name")
        page = PageDocument("page", {"x": object()})
        texts: list[Any] = [
            "good",
            "",
            "x" * 300,
            5,
            "other",
            page,
            "also good",
            "s\ud800",
        ]
        names = ["a", "b", None, "d", "secret-name", "f", "g", "h"]
        with caplog.at_level(logging.INFO, "braidsdk"):
            chunks = braid.register_many(texts, names=names, on_error="skip", progress=False)
        assert [chunk.name for chunk in chunks] == ["a", "g"]
        assert [(each.index, each.name, type(each.error)) for each in chunks.skipped] == [
            (1, "b", EmptyTextError),
            (2, None, WindowExceededError),
            (3, "d", InputError),
            (4, "secret-name", NameTakenError),
            (5, "f", InputError),
            (7, "h", InputError),
        ]
        assert str(chunks.skipped[0]).startswith("text 1 (b): The text must hold something")
        assert len(braid.chunks) == 3
        assert [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()] == [
            f"skipped text {each.index}: {type(each.error).__name__}" for each in chunks.skipped
        ]
        assert "secret" not in caplog.text
        with pytest.raises(EmptyTextError):
            braid.register_many(texts, names=names, progress=False)
        assert len(braid.chunks) == 3
        with pytest.raises(UnknownChunkError):
            braid.register_many(texts, names=names, anchor="nobody", on_error="skip", progress=False)
        with pytest.raises(InputError, match=r"got 'skp'. Did you mean 'skip'"):
            braid.register_many(texts, on_error="skp", progress=False)  # type: ignore[arg-type]


def test_a_text_too_large_for_the_pool_is_skipped() -> None:
    with FakeBraid(pool_bytes=4096) as braid:
        (chunk,) = braid.register_many(["small", "large " * 100], on_error="skip", progress=False)
        assert chunk.text == "small"
        with pytest.raises(PoolFullError):
            braid.register_many(["small", "large " * 100], progress=False)


def test_an_estimate_says_what_registering_then_takes(random_braid: Braid, tmp_path: Path) -> None:
    rules = random_braid.register_system(RULES)
    before = random_braid.stats()
    expected = random_braid.estimate([*TEXTS, TEXTS[0], " "], anchor=rules)
    assert random_braid.stats() == before, "nothing was written"
    tokens = sum(len(chunk.token_ids) for chunk in random_braid.register_many(TEXTS, progress=False))
    assert (expected.chunks, expected.tokens, expected.tokens_to_compute) == (5, tokens, tokens)
    files = sum(path.stat().st_size for path in entry_files(tmp_path / "store"))
    random_braid.register_many(TEXTS, anchor=rules, progress=False)
    written = sum(path.stat().st_size for path in entry_files(tmp_path / "store")) - files
    assert written <= expected.bytes_to_write <= 1.2 * written
    assert expected.free_disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert expected.seconds is not None
    after = random_braid.estimate([*TEXTS, "One more."], anchor=rules)
    assert 0 < after.tokens_to_compute < 10
    done = random_braid.estimate(TEXTS, anchor=rules)
    assert (done.tokens_to_compute, done.bytes_to_write, done.seconds) == (0, 0, 0.0)
    assert "5 chunks" in str(done)
    assert "nothing to compute now" in str(done)


def entry_files(store: Path) -> list[Path]:
    return list((store / "entries").rglob("*.safetensors"))


def test_without_an_anchor_an_estimate_says_that_texts_wait(random_braid: Braid) -> None:
    expected = random_braid.estimate(TEXTS)
    assert (expected.tokens_to_compute, expected.bytes_to_write) == (0, 0)
    assert expected.deferred_tokens == expected.tokens > 0
    assert "wait for the first question" in str(expected)


def test_a_missing_anchor_is_part_of_an_estimate(random_checkpoint: Path, tmp_path: Path) -> None:
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        rules = braid.register_system(RULES)
    shutil.rmtree(tmp_path / "s" / "entries")
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        with ChunkStore(tmp_path / "s") as store:
            list(store.stream(braid.compose([rules])._keys))  # which sets the missing file aside
        expected = braid.estimate(TEXTS[:1], anchor=rules)
        assert expected.tokens_to_compute == expected.tokens + len(rules.token_ids)


def test_an_unknown_rate_is_measured_before_long_work_and_remembered(random_checkpoint: Path, tmp_path: Path) -> None:
    long = ["word " * 900 + str(n) for n in range(5)]
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        assert braid.estimate(["short"], level=0).seconds is None
        expected = braid.estimate(long, level=0)
        assert expected.seconds is not None
        assert expected.seconds > 0
        assert braid.estimate(["short"], level=0).seconds is not None
        assert braid.stats().pool_used_bytes == 0
        assert braid.stats().entries == 0
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        assert braid.estimate(["short"], level=0).seconds is not None, "a later process knows it"
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu", dtype="bfloat16") as braid:
        assert braid.estimate(["short"], level=0).seconds is None, "of another dtype it says nothing"


def test_what_does_not_fit_on_the_disk_is_refused_before_anything_is_computed(
    random_braid: Braid, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = random_braid.register_system(RULES)
    needed = random_braid.estimate(TEXTS, anchor=rules).bytes_to_write
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("braidsdk.engine.runner.forward", lambda *_: pytest.fail("something was computed"))
    for free in (0, needed, needed + MARGIN_BYTES - 1):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage(0, 0, free))
        with pytest.raises(StoreFullError, match=r"must have room for .* and 67.1 MB to spare.*Nothing was computed"):
            random_braid.register_many(["word " * 1000, *TEXTS] if not free else TEXTS, anchor=rules, progress=False)
        with pytest.raises(StoreFullError):
            random_braid.register_many(TEXTS, anchor=rules, on_error="skip", progress=False)
    assert random_braid.chunks.list() == [rules]
    random_braid.register_many(TEXTS, progress=False)  # writes no entry, so it needs no room
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, needed + MARGIN_BYTES))
    assert len(random_braid.register_many(TEXTS, anchor=rules, progress=False)) == 5


def test_the_estimate_is_logged_before_the_work(random_braid: Braid, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "braidsdk"):
        random_braid.register_many(TEXTS, level=0, progress=False)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("registering 5 chunks of ")
    assert any(line.startswith("published") for line in lines[1:])


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(None, "in an unknown time"), (0.2, "about 1 s"), (70, "about 70 s"), (1800, "about 30 min"), (9000, "2.5 h")],
)
def test_an_estimate_in_words(seconds: float | None, says: str) -> None:
    words = str(RegistrationEstimate(1, 1200, 1000, 3_400_000_000, 5_000_000, seconds))
    assert says in words
    assert "1 chunk of 1,200 tokens; 1,000 to compute" in words
    assert "3.4 GB to write, 5.0 MB free" in words


def test_progress_goes_from_nothing_to_all(random_braid: Braid) -> None:
    texts = ["word " * 700 + str(n) for n in range(4)]
    seen: list[Progress] = []
    chunks = random_braid.register_many(texts, level=0, on_progress=seen.append, progress=False)
    total = sum(len(chunk.token_ids) for chunk in chunks)
    assert seen[0] == Progress(0, total, 0, 4, None, None)
    assert (seen[-1].done_tokens, seen[-1].done_chunks, seen[-1].total_chunks) == (total, 4, 4)
    assert len(seen) > 3
    for earlier, later in itertools.pairwise(seen):
        assert later.done_tokens > earlier.done_tokens
        assert later.tokens_per_s
        assert later.seconds_left is not None
        assert math.isclose(later.seconds_left * later.tokens_per_s, total - later.done_tokens, abs_tol=1e-3)
    seen.clear()
    random_braid.register_many(texts, level=0, on_progress=seen.append, progress=False)
    assert seen == [], "nothing was to be computed"


def test_a_callback_that_raises_ends_the_run_and_keeps_what_is_done(random_braid: Braid) -> None:
    texts = ["word " * 700 + str(n) for n in range(4)]

    def stop(progress: Progress) -> None:
        if progress.done_chunks:
            raise TimeoutError("long enough")

    with pytest.raises(TimeoutError):
        random_braid.register_many(texts, level=0, on_progress=stop, progress=False)
    done = random_braid.stats().entries
    assert 0 < done < 4
    again: list[Progress] = []
    random_braid.register_many(texts, level=0, on_progress=again.append, progress=False)
    assert again[0].total_chunks in (4 - done, 3 - done), "one more may have been on its way to the disk"


INTERRUPTED = """
import sys
from braidsdk import Braid

def report(progress):
    print(progress.done_chunks, flush=True)
    if progress.done_chunks:
        sys.stdin.readline()  # wait here for the signal

with Braid(sys.argv[1], store=sys.argv[2], device="cpu") as braid:
    braid.register_many([f"{'word ' * 700}{n}" for n in range(6)], level=0, on_progress=report)
"""


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_everything_that_was_published(random_checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(random_checkpoint), str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert [child.stdout.readline().strip() for _ in range(2)] == ["0", "1"]
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors
    with ChunkStore(store) as opened:
        held = opened.stats("default")
        assert (held.damaged, held.chunks) == (0, 6)
        assert 0 < held.entries < 6
        assert not list((store / "tmp").glob("*.part"))
    with Braid(random_checkpoint, store=store, device="cpu") as braid:
        left = braid.estimate([f"{'word ' * 700}{n}" for n in range(6)], level=0)
        assert left.tokens_to_compute == left.tokens * (6 - held.entries) // 6


def test_a_chunk_survives_pickling(random_braid: Braid) -> None:
    chunk = random_braid.register(TEXTS[0], name="a", metadata={"v": [1]})
    copy = pickle.loads(pickle.dumps(chunk))
    assert (copy, copy.name, copy.metadata) == (chunk, "a", {"v": [1]})
    assert copy.token_ids == chunk.token_ids != ()
    assert random_braid.compose([copy]).input_ids == random_braid.compose([chunk]).input_ids


def test_tokens_are_counted_as_they_are_registered(random_braid: Braid) -> None:
    for text in ("Oslo is a city.", "\n Oslo is a city. \n\n", "e\u0301tude"):
        assert random_braid.count_tokens(text) == len(random_braid.register(text).token_ids)
    assert random_braid.count_tokens(" \n") == 0, "it can't be registered"
