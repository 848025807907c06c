"""What the engine's tests share: an engine that checks itself, passes that are counted and held up, and a last look."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest
from torch import Tensor

from braidsdk import Braid
from braidsdk.cache.resident import State
from braidsdk.engine.engine import Engine
from braidsdk.models.base import Batch

T = TypeVar("T")

WAIT_S = 30.0
"""What nothing here takes, however busy the machine; a test that hangs fails instead."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect minutes of load unless they are asked for."""
    if "slow" in config.getoption("-m", default=""):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def _engine_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_CHECK", "1")


def wait_until(true: Callable[[], object]) -> None:
    """Wait for something that other threads do."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


class Threads:
    """An executor with a thread for each job. Nothing waits for the threads: if one hangs, its test fails and ends."""

    def submit(self, work: Callable[..., T], *arguments: object, **options: object) -> "Future[T]":
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work(*arguments, **options))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


@pytest.fixture(scope="session")
def threads() -> Threads:
    """For what goes on beside a test."""
    return Threads()


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    """`wait_until`."""
    return wait_until


class Passes:
    """The passes of a model: how many tokens each run of each pass had, and something to do before each."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: list[list[int]] = []
        self.before: Callable[[Batch], object] = lambda batch: None
        self._forward = engine.model.forward

    def forward(self, batch: Batch, kv: Tensor, logit_rows: Tensor | None) -> Tensor | None:
        self.seen.append([each.rows.stop - each.rows.start for each in batch.requests])
        self.before(batch)
        return self._forward(batch, kv, logit_rows)

    def hold_until_asked(self, requests: int) -> None:
        """Hold up the next pass until so many requests have come in all, with those that run."""
        loop = self.engine._loop

        def hold(batch: Batch) -> None:
            self.before = lambda batch: None
            wait_until(lambda: loop.scheduler.admitted + loop.scheduler.waiting + loop._mail.qsize() >= requests)

        self.before = hold


@pytest.fixture
def passes(random_braid: Braid, monkeypatch: pytest.MonkeyPatch) -> Passes:
    """The passes of `random_braid`."""
    made = Passes(random_braid._engine)
    monkeypatch.setattr(random_braid._engine.model, "forward", made.forward)
    return made


class Gate:
    """A model that stops at its next pass, until the gate is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def close_for(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = engine.model.forward

        def forward(batch: Batch, kv: Tensor, logit_rows: Tensor | None) -> Tensor | None:
            self.reached.set()
            assert self.opened.wait(WAIT_S)
            return honest(batch, kv, logit_rows)

        monkeypatch.setattr(engine.model, "forward", forward)


@pytest.fixture
def gate(random_braid: Braid, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A closed gate before the passes of `random_braid`."""
    made = Gate()
    made.close_for(random_braid._engine, monkeypatch)
    return made


def check_settled(braid: Braid) -> None:
    """When nothing runs any more, no page, pin or slot is lost: pages are free or belong to entries without a pin."""
    engine = braid._engine
    loop = engine._loop

    def all_is_there() -> bool:
        loop._integrity()
        pool, residency = engine.pool, loop.residency
        if any(loop.scheduler):
            return False
        assert not any((loop._tasks, loop._rows, residency._held))
        if residency._making or residency._writing or pool._pins:
            return False  # an I/O thread is still at it
        assert all(entry.state is State.READY for entry in pool._entries.values())
        of_entries = {page for entry in pool._entries.values() for page in entry.pages.tolist()}
        assert pool.used_bytes == len(of_entries) * pool.page_bytes
        return True

    wait_until(lambda: engine.call(all_is_there))


@pytest.fixture(scope="session")
def settled() -> Callable[[Braid], None]:
    """`check_settled`."""
    return check_settled


@pytest.fixture
def make_braid(random_checkpoint: Path, tmp_path: Path) -> Callable[..., Braid]:
    """Another Braid on the random checkpoint, by default over the store of `random_braid`."""

    def make(store: str = "store", **options: object) -> Braid:
        return Braid(random_checkpoint, store=tmp_path / store, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def script_environment(random_checkpoint: Path, tmp_path: Path) -> dict[str, str]:
    """For processes that a test starts."""
    return {**os.environ, "BRAID_CHECK": "1", "CHECKPOINT": str(random_checkpoint), "STORE": str(tmp_path / "scripted")}
