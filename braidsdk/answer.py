"""How an answer is read: whole, or piece by piece; from a thread, or from an event loop.

Readers turn token ids into text. Nothing here drives the engine: a request goes on whether it is read or not, and is
cancelled when its reader is closed or dropped.
"""

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from types import TracebackType
from typing import ClassVar, Self

from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request
from braidsdk.engine.scheduler import ROW_SLOTS
from braidsdk.errors import BraidError
from braidsdk.prompt.answer_text import AnswerText
from braidsdk.prompt.history import Spoken
from braidsdk.types import Answer

Start = Callable[[], Request]
"""Checks a call's arguments and makes its request."""


def ask(engine: Engine, request: Request) -> Answer:
    """Submit a question and wait for its answer. An interrupt cancels it."""
    engine.run(request)
    return finished(engine, request)


def ask_many(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """`ask` for many at once; one that fails, or an interrupt, ends them all."""
    running: deque[Request] = deque()
    answers: list[Answer] = []
    left = iter(requests)
    try:
        while True:
            while len(running) < 2 * ROW_SLOTS and (request := next(left, None)):
                running.append(engine.submit(request))
            if not running:
                return answers
            running[0].result()
            answers.append(finished(engine, running.popleft()))
    finally:
        for request in running:
            engine.cancel(request)


async def aask(engine: Engine, start: Start) -> Answer:
    """`ask` for an event loop: arguments are checked in a thread, and nothing blocks the loop. A cancelled task cancels
    the request."""
    request = await engine.beside_the_loop(start)
    bell = _Bell.of_this_loop()
    done = asyncio.Event()
    request.wake = partial(bell.ring, done)
    engine.submit(request)
    try:
        while not request.ended:
            done.clear()
            if not request.ended:
                await done.wait()
    finally:
        if not request.ended:
            engine.cancel(request)
    request.result()
    return finished(engine, request)


def finished(engine: Engine, request: Request) -> Answer:
    """The answer of a request that has finished."""
    text = _text(engine, request)
    for token in request.tokens:
        text.feed(token)
    text.end()
    return _answer(engine, request, text)


class _Reader:
    """What readers of both kinds of stream have in common: the text so far, and the request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._request: Request | None = None
        self._text: AnswerText | None = None
        self._read = 0
        self._closed = False
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            BraidError: the stream has not ended, or was closed before its end.
        """
        if self._answer is None:
            raise BraidError("The answer is not complete. Read the stream to its end first.")
        return self._answer

    def _submit(self, request: Request) -> Request:
        """Give the request to the engine; it is cancelled when this reader is dropped."""
        request.streamed = True
        self._engine.submit(request)
        self._request = request
        self._text = _text(self._engine, request)
        if self._closed:  # meanwhile, by another thread
            self._stop()
        weakref.finalize(self, self._engine.cancel, request).atexit = False  # then the engine ends all
        return request

    def _next_piece(self, request: Request) -> str | None:
        """The text of the tokens that are there, "" if none can be shown yet; None once there are no more.

        Raises:
            BraidError: why the request failed.
        """
        if self._answer or self._closed or self._text is None:
            return None
        ended = request.ended  # before the tokens: those of a request that has ended are all there
        piece = ""
        while self._read < len(request.tokens) and not piece:
            piece = self._text.feed(request.tokens[self._read])
            self._read += 1
        if piece or not ended or self._read < len(request.tokens):
            return piece
        self._closed = True
        request.result()
        piece = self._text.end()
        self._answer = _answer(self._engine, request, self._text)
        return piece

    def _stop(self) -> None:
        """Let generation end; never blocks."""
        self._closed = True
        if self._request is not None and not self._request.ended:
            self._engine.cancel(self._request)


class Stream(_Reader):
    """An answer that arrives in pieces of text. An iterator, and a context manager that stops generation on leaving.

    The request is submitted when the first piece is asked for, and goes on from then whether it is read or not. Any
    thread may read or close it. Closed or dropped early it gives back the memory that it holds.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        super().__init__(engine)
        self._made = request
        self._lock = RLock()

    def close(self) -> None:
        """Stop generating and free what the call holds. Safe to call twice."""
        self._stop()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        self._engine.check_process()  # before the lock, and before waiting for what never comes
        with self._lock:
            if self._closed:
                raise StopIteration
            request = self._request or self._submit(self._made)
            while True:
                piece = self._next_piece(request)
                if piece:
                    return piece
                if piece is None or self._answer:
                    raise StopIteration
                request.wait(self._read)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(_Reader):
    """An answer that arrives in pieces of text: an async iterator, and an async context manager that stops generation
    on leaving.

    Nothing is computed, and no argument is checked, before the first piece is asked for. If a task that waits for a
    piece is cancelled, the request is cancelled and what it holds is freed. Closed or dropped early the same happens.
    """

    def __init__(self, engine: Engine, start: Start) -> None:
        super().__init__(engine)
        self._start = start
        self._news: asyncio.Event | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        try:
            return await self._next()
        except asyncio.CancelledError:
            self._stop()
            raise

    async def _next(self) -> str:
        self._engine.check_process()
        if self._closed:
            raise StopAsyncIteration
        if self._request is None or self._news is None:
            request = await self._engine.beside_the_loop(self._start)
            self._news = asyncio.Event()
            request.wake = partial(_Bell.of_this_loop().ring, self._news)
            self._submit(request)
        else:
            request = self._request
        while True:
            self._news.clear()
            piece = self._next_piece(request)
            if piece:
                return piece
            if piece is None or self._answer:
                raise StopAsyncIteration
            await self._news.wait()

    async def aclose(self) -> None:
        """Stop generating and free what the call holds. Safe to call twice."""
        self._stop()
        if self._news:
            self._news.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Bell:
    """Wakes tasks of one event loop from the engine's thread: with one call into the loop, however many it wakes. That
    call lets other threads run, so it comes after all tasks of a step are marked."""

    _of: ClassVar["weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell]"] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._rung: deque[asyncio.Event] = deque()
        self._called = False

    @classmethod
    def of_this_loop(cls) -> "_Bell":
        loop = asyncio.get_running_loop()
        return cls._of.setdefault(loop, cls(loop))

    def ring(self, event: asyncio.Event) -> Callable[[], None] | None:
        """Mark an event that is to be set in the loop; what it returns is to be called soon. The event's task may be
        gone, and the loop too."""
        self._rung.append(event)
        return None if self._called else self._call

    def _call(self) -> None:
        loop = self._loop()
        if self._called or loop is None or loop.is_closed():
            return
        self._called = True
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # closed in between
            return

    def _deliver(self) -> None:
        self._called = False  # first: what is rung from now on calls again
        while self._rung:
            self._rung.popleft().set()


def _text(engine: Engine, request: Request) -> AnswerText:
    params = request.params
    if params is None:
        raise BraidError("The request generates no text.")
    return AnswerText(engine.layout, params.stop, params.stop_ids)


def _answer(engine: Engine, request: Request, text: AnswerText) -> Answer:
    """What a finished request gave; its ids are remembered for the conversation's next turn."""
    outcome = request.outcome
    if outcome is None:
        raise BraidError("The request has no answer.")
    ids = text.ids()
    # A text that ends within a token has no ids of its own; its turn is then encoded from the text.
    if engine.layout.decode(ids) == text.text:
        computed = min(len(ids), len(request.tokens) - 1)
        engine.turns.remember(request.composition.tail, text.text, Spoken(ids, computed))
    return Answer(
        text=text.text,
        token_ids=tuple(request.tokens),
        prompt_ids=request.composition.input_ids,
        finish_reason=outcome.finish_reason,
        usage=outcome.usage,
        timings=outcome.timings,
    )
