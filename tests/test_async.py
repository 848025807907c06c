"""Answers for an event loop: it is never blocked, a cancelled call stops and frees its pages, errors are typed."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from torch import Tensor

from braidsdk import AsyncStream, Braid, Context
from braidsdk.cache.pool import Pool
from braidsdk.engine import runner
from braidsdk.errors import BraidError, ClosedError, EmptyTextError, InputError, UnknownChunkError
from braidsdk.testing import FakeBraid

Freed = Callable[[], Awaitable[bool]]

WAIT_S = 30.0
"""What no step takes; a test that deadlocks fails instead of hanging."""


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, WAIT_S))


@pytest.fixture
def freed(random_braid: Braid, pool_of: Callable[[Braid], Pool]) -> Freed:
    """Waits until the step that runs has ended and given back what it held."""

    async def wait() -> bool:
        ends = time.monotonic() + WAIT_S
        while time.monotonic() < ends:
            try:
                pool = await asyncio.to_thread(pool_of, random_braid)
            except AssertionError:
                pass
            else:
                if pool.room == pool.capacity_pages:
                    return True
            await asyncio.sleep(0.005)
        return False

    return wait


@pytest.fixture
def context(random_braid: Braid) -> Context:
    composed = random_braid.compose([random_braid.register("The first document.")])
    composed.prepare()
    return composed


@pytest.fixture
def gate(context: Context, monkeypatch: pytest.MonkeyPatch) -> Iterator["Gate"]:
    """Lets steps of the model wait for the test."""
    made = Gate()
    monkeypatch.setattr(runner, "forward", made.wrap(runner.forward))
    yield made
    made.open.set()


class Gate:
    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.steps = 0

    def wrap(self, honest: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def step(*arguments: Any) -> Tensor:
            self.steps += 1
            self.reached.set()
            assert self.open.wait(WAIT_S), "the event loop was blocked"
            return honest(*arguments)

        return step


async def reach(gate: Gate) -> None:
    while not gate.reached.is_set():
        await asyncio.sleep(0.001)


def test_an_answer_and_a_stream_are_those_of_the_plain_calls(context: Context) -> None:
    want = context.ask("Well?", max_new_tokens=20)

    async def main() -> None:
        answer = await context.aask("Well?", max_new_tokens=20)
        assert (answer.text, answer.token_ids) == (want.text, want.token_ids)
        stream = context.astream("Well?", max_new_tokens=20)
        assert isinstance(stream, AsyncStream)
        with pytest.raises(BraidError, match="not complete"):
            _ = stream.answer
        pieces = [piece async for piece in stream]
        assert len(pieces) > 1
        assert "".join(pieces) == want.text == stream.answer.text
        assert stream.answer.token_ids == want.token_ids

    run(main())


@pytest.mark.parametrize("call", ["aask", "astream"])
def test_the_loop_goes_on_while_the_model_works(context: Context, gate: Gate, call: str) -> None:
    async def main() -> None:
        gate.open.clear()
        if call == "aask":
            task = asyncio.create_task(context.aask("Well?", max_new_tokens=3))
        else:
            task = asyncio.create_task(anext(context.astream("Well?", max_new_tokens=3)))  # type: ignore[arg-type]
        await reach(gate)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not task.done()
        gate.open.set()
        assert await task

    run(main())


def test_many_answers_and_streams_at_once(context: Context) -> None:
    want = context.ask("Well?", max_new_tokens=12).text

    async def stream() -> str:
        return "".join([piece async for piece in context.astream("Well?", max_new_tokens=12)])

    async def main() -> None:
        answers = [context.aask("Well?", max_new_tokens=12) for _ in range(4)]
        got = await asyncio.gather(*answers, *(stream() for _ in range(20)))
        assert {str(each) for each in got} == {want}

    run(main())


def test_a_cancelled_answer_stops_and_frees_its_pages(
    random_braid: Braid, context: Context, gate: Gate, freed: Freed
) -> None:
    async def main() -> None:
        gate.open.clear()
        task = asyncio.create_task(context.aask("Well?", max_new_tokens=400))
        waiting = asyncio.create_task(context.aask("And then?", max_new_tokens=400))
        await reach(gate)
        assert random_braid.stats().running
        task.cancel()
        waiting.cancel()
        for each in (task, waiting):
            with pytest.raises(asyncio.CancelledError):
                await each
        gate.open.set()
        assert await freed()
        assert gate.steps <= 2
        assert (await context.aask("Well?", max_new_tokens=2)).token_ids

    run(main())


def test_an_answer_that_waits_behind_another_call_can_be_cancelled(context: Context, gate: Gate, freed: Freed) -> None:
    async def main() -> None:
        gate.open.clear()
        holding = asyncio.create_task(context.aask("And then?", max_new_tokens=2))
        await reach(gate)
        task = asyncio.create_task(context.aask("Well?", max_new_tokens=400))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()
        assert (await holding).token_ids
        assert await freed()
        assert gate.steps == 2

    run(main())


def test_a_cancelled_stream_stops_and_frees_its_pages(context: Context, gate: Gate, freed: Freed) -> None:
    async def main() -> None:
        stream = context.astream("Well?", max_new_tokens=400)
        assert await anext(stream)
        gate.open.clear()

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()
        assert await freed()
        steps = gate.steps
        assert [piece async for piece in stream] == []
        assert gate.steps == steps < 300

    run(main())


@pytest.mark.parametrize("how", ["aclosing", "async with", "aclose", "dropped"])
def test_a_stream_closed_early_frees_its_pages(
    random_braid: Braid, context: Context, gate: Gate, freed: Freed, how: str
) -> None:
    async def main() -> None:
        stream = context.astream("Well?", max_new_tokens=1500)
        if how == "aclosing":
            async with aclosing(stream):
                assert await anext(stream)
        elif how == "async with":
            async with stream:
                assert await anext(stream)
        else:
            assert await anext(stream)
            assert random_braid.stats().running
            if how == "aclose":
                await stream.aclose()
                await stream.aclose()
        if how != "dropped":
            assert await freed()
            assert [piece async for piece in stream] == []
        del stream
        assert await freed()
        assert gate.steps < 1000, "it went on to its end"

    run(main())


def test_a_stream_that_was_never_read_computes_nothing(context: Context, gate: Gate) -> None:
    async def main() -> None:
        stream = context.astream("Well?")
        await stream.aclose()
        assert [piece async for piece in stream] == []

    run(main())
    assert gate.steps == 0


def test_errors_keep_their_types(
    random_braid: Braid, context: Context, freed: Freed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with pytest.raises(EmptyTextError):
            await context.aask(" ")
        with pytest.raises(EmptyTextError):
            await anext(context.astream(" "))
        with pytest.raises(InputError, match="temperature"):
            await context.aask("Well?", temperature=-1)
        with pytest.raises(TypeError, match="Did you mean 'max_new_tokens'"):
            await context.aask("Well?", max_tokens=1)  # type: ignore[call-arg]
        with pytest.raises(UnknownChunkError):
            await random_braid.aask("Well?", chunks=["nobody"])
        with pytest.raises(UnknownChunkError):
            await anext(random_braid.astream("Well?", chunks=["nobody"]))
        stream = context.astream("Well?", max_new_tokens=1500)
        await anext(stream)
        monkeypatch.setattr(runner, "forward", failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            async for _ in stream:
                pass
        assert await freed()

    run(main())


def failing(*_: object) -> Tensor:
    raise RuntimeError("out of luck")


def test_after_close_it_is_a_typed_error() -> None:
    async def main() -> None:
        braid = FakeBraid()
        context = braid.compose([])
        braid.close()
        for call in (context.aask("Well?"), anext(context.astream("Well?")), braid.aask("x", chunks=[])):
            with pytest.raises(ClosedError, match="closed"):
                await call

    run(main())


def test_the_facade_composes_and_asks() -> None:
    async def main() -> None:
        with FakeBraid(lambda question, documents: f"{question} {', '.join(documents)}") as braid:
            chunks = braid.register_many(["one", "two"], progress=False)
            assert (await braid.aask("Which?", chunks=chunks)).text == "Which? one, two"
            assert "".join([p async for p in braid.astream("Which?", chunks=chunks[:1])]) == "Which? one"

    run(main())
