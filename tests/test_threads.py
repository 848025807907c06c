"""Several threads on one Braid: their requests share steps, and memory comes back once, however a call ends."""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor

from braidsdk import Braid, Context
from braidsdk.cache.pool import Pool
from braidsdk.engine import runner
from braidsdk.errors import ClosedError, PoolFullError, UnknownChunkError

TEXTS = [f"Document number {n}. " * (3 + 5 * n) for n in range(6)]

PoolOf = Callable[[Braid], Pool]

WAIT_S = 30.0
"""What no step takes; a test that deadlocks fails instead of hanging."""


def in_threads(jobs: Sequence[Callable[[], object]]) -> list[object]:
    """Run all jobs at once, each in a thread of its own."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> object:
        start.wait(WAIT_S)
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [future.result(WAIT_S) for future in [threads.submit(run, job) for job in jobs]]


@pytest.fixture
def small(random_checkpoint: Path, tmp_path: Path, page_bytes: int, pool_of: PoolOf) -> Iterator[Braid]:
    """A Braid whose pool holds one of the larger contexts with its answer, and not two; checked to have lost nothing
    afterwards."""
    options = {"device": "cpu", "dtype": "float32", "pool_bytes": 9 * page_bytes}
    with Braid(random_checkpoint, store=tmp_path / "small", **options) as braid:  # type: ignore[arg-type]
        yield braid
        assert pool_of(braid).room == 9


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


def test_threads_share_steps(context: Context, random_braid: Braid) -> None:
    whole = context.ask("Well?", max_new_tokens=40)
    before = random_braid.stats().steps
    texts = in_threads([lambda: "".join(context.stream("Well?", max_new_tokens=40))] * 3)
    assert texts == [whole.text] * 3
    assert random_braid.stats().steps - before < 3 * 40 * 0.8


def test_calls_that_do_not_fit_together_follow_one_another(small: Braid) -> None:
    context = small.compose([small.register(TEXTS[5])])
    want = context.ask("Well?", max_new_tokens=500).text
    with context.stream("Well?", max_new_tokens=500) as first:
        pieces = [next(first)]
        assert context.ask("Well?", max_new_tokens=500).text == want
        assert "".join([*pieces, *first]) == want
    with pytest.raises(PoolFullError, match="limit"):
        context.ask("Well?", max_new_tokens=1500)


def test_a_stream_closed_from_another_thread_ends_for_who_reads_it(
    context: Context, random_braid: Braid, pool_of: PoolOf
) -> None:
    before = pool_of(random_braid).used_bytes
    stream = context.stream("Well?", max_new_tokens=1500)
    assert next(stream)
    closers = [threading.Thread(target=stream.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    read = sum(1 for _ in stream)
    for closer in closers:
        closer.join(WAIT_S)
        assert not closer.is_alive()
    assert read < 1400
    assert list(stream) == []
    assert pool_of(random_braid).used_bytes == before, "given back once"


def test_a_dropped_stream_frees_its_pages(context: Context, random_braid: Braid, pool_of: PoolOf) -> None:
    before = pool_of(random_braid).used_bytes
    gc.disable()
    try:
        stream = context.stream("Well?", max_new_tokens=1500)
        next(stream)
        with pytest.raises(AssertionError):
            pool_of(random_braid)
        del stream
        assert pool_of(random_braid).used_bytes == before
    finally:
        gc.enable()


def test_an_error_in_the_middle_frees_its_pages(
    context: Context, random_braid: Braid, pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pool_of(random_braid).used_bytes
    stream = context.stream("Well?", max_new_tokens=1500)
    next(stream)

    def failing(*_: object) -> Tensor:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            list(stream)
        with pytest.raises(RuntimeError):
            context.next_token_logits("Well?")
    assert list(stream) == []
    stream.close()
    assert pool_of(random_braid).used_bytes == before


def test_closing_the_braid_ends_running_streams(random_checkpoint: Path, tmp_path: Path) -> None:
    braid = Braid(random_checkpoint, store=tmp_path / "store", device="cpu")
    context = braid.compose([braid.register(TEXTS[0])])
    fresh, started = (context.stream("Well?", max_new_tokens=1500) for _ in range(2))
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
    for stream in (fresh, started):
        with pytest.raises(ClosedError):
            list(stream)
        stream.close()
        assert list(stream) == []
