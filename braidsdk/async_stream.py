"""Answers for an event loop: whole ones, and piece by piece. The work is done in threads (see `workers.py`)."""

from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Self

from braidsdk.errors import BraidError
from braidsdk.stream import Stream
from braidsdk.types import Answer
from braidsdk.workers import Workers


class Cancellation:
    """Tells a stream that runs in a thread to end, also if it has not begun yet. Never blocks."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._cancelled = False

    def watch(self, stream: Stream) -> Stream:
        """Take a stream; it ends before its first step if `cancel` was called."""
        self._stream = stream
        if self._cancelled:
            stream.stop()
        return stream

    def cancel(self) -> None:
        """Let the stream end after the step that runs."""
        self._cancelled = True  # first: of `watch` and this, one sees the other
        if self._stream is not None:
            self._stream.stop()


class AsyncStream:
    """An answer that arrives in pieces of text: an async iterator, and an async context manager that stops generation
    on leaving.

    Nothing is computed, and no argument is checked, before the first piece is asked for. If a task that waits for a
    piece is cancelled, generation stops after the step that runs and what it holds is freed. Closed or dropped early
    the same happens.
    """

    def __init__(self, workers: Workers, start: Callable[[], Stream]) -> None:
        self._workers = workers
        self._start = start
        self._lock = Lock()
        self._cancellation = Cancellation()
        self._stream: Stream | None = None
        self._closed = False

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            BraidError: the stream has not ended, or was closed before its end.
        """
        if self._stream is None:
            raise BraidError("The answer is not complete. Read the stream to its end first.")
        return self._stream.answer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        piece = None if self._closed else await self._workers.step(self._next, self._cancel)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Stop generating and free what the call holds, after the step that runs. Safe to call twice."""
        self._closed = True
        self._cancellation.cancel()
        if self._stream is not None:
            await self._workers.step(self._close, self._cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _next(self) -> str | None:
        with self._lock:
            if self._stream is None:
                self._stream = self._cancellation.watch(self._start())
        return next(self._stream, None)

    def _close(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.close()

    def _cancel(self) -> None:
        self._closed = True
        self._cancellation.cancel()
        self._workers.later(self._close)
