"""Threads that run an event loop's calls, so that the loop is never blocked.

Whole answers queue for one thread, as calls of several threads queue for the model. Steps of streams have threads of
their own, so that they go on between the tokens of an answer.

Knows nothing about models or text.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

from braidsdk.errors import ClosedError

STEP_THREADS = 16
"""Steps of streams that wait for the model at once; more wait for a thread."""

Result = TypeVar("Result")


class Workers:
    """The threads of one Braid; none is started before it is needed."""

    def __init__(self) -> None:
        self._answers = ThreadPoolExecutor(1, "braid-answer")
        self._steps = ThreadPoolExecutor(STEP_THREADS, "braid-step")

    async def answer(self, work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
        """Run a whole call. If the task is cancelled, `cancel` is called at once; it must not block."""
        return await _run(self._answers, work, cancel)

    async def step(self, work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
        """Run one step of a stream; `cancel` as in `answer`."""
        return await _run(self._steps, work, cancel)

    def later(self, work: Callable[[], None]) -> None:
        """Run something that nobody waits for; nothing if the threads were ended."""
        with suppress(RuntimeError):
            self._steps.submit(work)

    def close(self) -> None:
        """End the threads once what they run has ended. Again is harmless."""
        self._answers.shutdown(wait=False)
        self._steps.shutdown(wait=False)


async def _run(executor: Executor, work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    loop = asyncio.get_running_loop()
    try:
        future = loop.run_in_executor(executor, copy_context().run, work)
    except RuntimeError as error:
        raise ClosedError("This Braid is closed. Open a new one; what it stored is still there.") from error
    try:
        return await future
    except asyncio.CancelledError:
        cancel()
        raise
