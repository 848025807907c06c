"""Several threads on one Braid: calls queue, streams take turns, and memory comes back once, however a call ends."""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import pytest
from torch import Tensor

from braidsdk import Braid, Context, Stream, decoding, generate
from braidsdk.errors import ClosedError, PoolFullError, UnknownChunkError
from braidsdk.fair_lock import FairLock

TEXTS = [f"Document number {n}. " * (3 + 5 * n) for n in range(6)]
WAIT_S = 30.0
"""What no step takes; a test that deadlocks fails instead of hanging."""


def pages(braid: Braid) -> tuple[int, int]:
    """Pages that are free, and pages of resident entries; no page is both, missing, or listed twice."""
    pool = braid._engine.pool
    owned = [page for entry in pool._entries.values() for page in entry.pages.tolist()]
    assert sorted([*pool._free, *owned]) == list(range(pool.kv.shape[2]))
    assert not pool._pins
    return len(pool._free), len(owned)


def in_threads(jobs: Sequence[Callable[[], object]]) -> list[object]:
    """Run all jobs at once, each in a thread of its own."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> object:
        start.wait(WAIT_S)
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [future.result(WAIT_S) for future in [threads.submit(run, job) for job in jobs]]


@pytest.fixture
def small(random_braid: Braid, random_checkpoint: Path, tmp_path: Path) -> Iterator[Braid]:
    """A Braid whose pool holds one of the larger contexts with its answer, and not two."""
    bound = 9 * random_braid._engine.pool.page_bytes
    with Braid(random_checkpoint, store=tmp_path / "small", device="cpu", dtype="float32", pool_bytes=bound) as braid:
        yield braid


@pytest.fixture
def context(random_braid: Braid) -> Context:
    composed = random_braid.compose([random_braid.register(TEXTS[0])])
    composed.prepare()
    return composed


def test_threads_get_the_answers_that_they_would_get_one_after_another(small: Braid) -> None:
    documents = small.register_many(TEXTS)
    contexts = [small.compose(documents[n : n + 3], mode="isolated") for n in range(4)]
    contexts += [small.compose(documents[: n + 1], mode="exact") for n in range(3)]
    want = [context.ask("Well?", max_new_tokens=8).token_ids for context in contexts]
    for _ in range(2):
        got = in_threads([lambda c=c: c.ask("Well?", max_new_tokens=8).token_ids for c in contexts])  # type: ignore[misc]
        assert got == want
    pages(small)


def test_threads_may_register_ask_and_delete_at_once(small: Braid) -> None:
    want = [small.ask("Well?", chunks=[small.register(text)], max_new_tokens=4).token_ids for text in TEXTS]

    def work(index: int) -> None:
        for _ in range(3):
            document = small.register(TEXTS[index])
            try:
                assert small.ask("Well?", chunks=[document], max_new_tokens=4).token_ids == want[index]
            except UnknownChunkError:
                assert index < 2, "nobody deletes this one"

    def delete() -> None:
        for index in (0, 1, 0, 1):
            small.chunks.delete(small.register(TEXTS[index]))

    in_threads([*(lambda index=index: work(index) for index in range(len(TEXTS))), delete])  # type: ignore[misc]
    pages(small)


def test_streams_of_several_threads_take_turns(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = context.ask("Well?", max_new_tokens=40)
    honest, steps = decoding.compute_logits, []

    def noting(*arguments) -> Tensor:  # type: ignore[no-untyped-def]
        steps.append(threading.get_ident())
        return honest(*arguments)

    monkeypatch.setattr(decoding, "compute_logits", noting)
    texts = in_threads([lambda: "".join(context.stream("Well?", max_new_tokens=40))] * 3)
    assert texts == [whole.text] * 3
    running = [  # steps while all three ran
        step
        for place, step in enumerate(steps)
        if all(t in steps[: place + 1] and t in steps[place:] for t in set(steps))
    ]
    assert len(running) > 60
    assert max(len(list(run)) for _, run in groupby(running)) <= 2


def test_a_stream_waits_for_a_call_that_ends_by_itself_and_not_for_another_stream(small: Braid) -> None:
    document = small.register(TEXTS[5])
    context = small.compose([document])
    want = context.ask("Well?", max_new_tokens=200).text
    asked = threading.Event()
    honest = small._engine.model.forward

    def forward(*arguments):  # type: ignore[no-untyped-def]
        asked.set()
        return honest(*arguments)

    small._engine.model.forward = forward  # type: ignore[method-assign]

    def stream() -> str:
        assert asked.wait(WAIT_S)
        return "".join(context.stream("Well?", max_new_tokens=500))

    with ThreadPoolExecutor(2) as threads:
        later, first = threads.submit(stream), threads.submit(context.ask, "Well?", max_new_tokens=200)
        assert first.result(WAIT_S).text == want
        assert later.result(WAIT_S).startswith(want[:100])
    with context.stream("Well?", max_new_tokens=200) as open_stream:
        next(open_stream)
        with pytest.raises(PoolFullError, match="finish other answers"):
            context.ask("Well?", max_new_tokens=500)
        with pytest.raises(PoolFullError):
            next(context.stream("Well?", max_new_tokens=500))
        assert open_stream.__next__()
    pages(small)


def test_a_stream_closed_from_another_thread_stops_after_the_step_that_runs(
    context: Context, random_braid: Braid, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pages(random_braid)
    stream = context.stream("Well?", max_new_tokens=500)
    honest, closing, steps = decoding.compute_logits, threading.Event(), []

    def close() -> None:
        closing.set()
        stream.close()

    closers = [threading.Thread(target=close) for _ in range(3)]

    def noting(*arguments) -> Tensor:  # type: ignore[no-untyped-def]
        steps.append(1)
        if len(steps) == 10:
            for closer in closers:
                closer.start()
            assert closing.wait(WAIT_S)
            time.sleep(0.05)  # from the event to the inside of `close`
        return honest(*arguments)

    monkeypatch.setattr(decoding, "compute_logits", noting)
    monkeypatch.setattr(stream._stop, "feed", lambda piece: "")  # one piece of text may take many steps
    for _ in stream:
        pass
    for closer in closers:
        closer.join(WAIT_S)
        assert not closer.is_alive()
    assert len(steps) < 15
    assert list(stream) == []
    assert pages(random_braid)[1] == before[1], "given back once"


def test_a_dropped_stream_frees_its_pages_at_once(context: Context, random_braid: Braid) -> None:
    before = pages(random_braid)
    gc.disable()
    try:
        stream = context.stream("Well?", max_new_tokens=50)
        next(stream)
        with pytest.raises(AssertionError):
            pages(random_braid)
        del stream
        assert pages(random_braid)[1] == before[1]
    finally:
        gc.enable()


def test_a_stream_collected_within_a_step_of_another_frees_its_pages_after_it(
    context: Context, random_braid: Braid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run at any point, in a thread that holds the engine's lock too."""
    before = pages(random_braid)
    dropped = [context.stream("Well?", max_new_tokens=50)]
    next(dropped[0])
    pool, honest = random_braid._engine.pool, random_braid._engine.pool.allocate

    def allocate(tokens: int) -> Tensor:
        free = len(pool._free)
        dropped.clear()
        assert len(pool._free) == free, "the pool is not changed under a step's hands"
        return honest(tokens)

    monkeypatch.setattr(pool, "allocate", allocate)
    kept = context.stream("Well?", max_new_tokens=50)
    next(kept)
    kept.close()
    assert not dropped
    assert pages(random_braid)[1] == before[1]


def test_an_error_in_the_middle_frees_its_pages(
    context: Context, random_braid: Braid, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pages(random_braid)
    stream = context.stream("Well?", max_new_tokens=50)
    next(stream)

    def failing(*_: object) -> Tensor:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "compute_logits", failing)
        patch.setattr(generate, "compute_logits", failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            list(stream)
        with pytest.raises(RuntimeError):
            context.next_token_logits("Well?")
    assert list(stream) == []
    stream.close()
    assert pages(random_braid)[1] == before[1]


def test_closing_the_braid_ends_running_streams(random_checkpoint: Path, tmp_path: Path) -> None:
    braid = Braid(random_checkpoint, store=tmp_path / "store", device="cpu")
    context = braid.compose([braid.register(TEXTS[0])])
    fresh, started = (context.stream("Well?", max_new_tokens=50) for _ in range(2))
    next(started)

    def read() -> type[BaseException] | None:
        try:
            while True:
                context.ask("Well?", max_new_tokens=20)
        except ClosedError as error:
            return type(error)

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(read) for _ in range(3)]
        time.sleep(0.1)
        braid.close()
        assert [each.result(WAIT_S) for each in asking] == [ClosedError] * 3
    stream: Stream
    for stream in (fresh, started):
        with pytest.raises(ClosedError):
            next(stream)
        stream.close()
        assert list(stream) == []


def test_the_lock_is_granted_in_the_order_of_asking() -> None:
    lock, order = FairLock(), []
    lock.acquire()
    assert not lock.try_acquire()

    def ask(name: int) -> None:
        with lock:
            order.append(name)

    threads = []
    for name in range(5):
        threads.append(threading.Thread(target=ask, args=(name,)))
        threads[-1].start()
        while len(lock._waiting) <= name:
            time.sleep(0.001)
    lock.release()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [0, 1, 2, 3, 4]
    assert lock.try_acquire()


def test_a_waiting_thread_that_is_interrupted_does_not_keep_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.calls = 0

        def acquire(self) -> None:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt

    lock = FairLock()
    lock.acquire()
    monkeypatch.setattr("braidsdk.fair_lock.Lock", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    lock.release()
    assert lock.try_acquire()
