"""How an answer is read: whole, or piece by piece; from a thread, or from an event loop.

Readers turn token ids into text. Nothing here drives the engine: a request goes on whether it is read or not, and is
cancelled when its reader is closed or dropped.
"""

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from threading import RLock
from types import TracebackType
from typing import ClassVar, Self

from braidsdk.compose.attribution import sources
from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request
from braidsdk.engine.scheduler import ROW_SLOTS
from braidsdk.errors import BraidError
from braidsdk.prompt.answer_text import AnswerText
from braidsdk.prompt.history import Spoken
from braidsdk.types import Answer, Usage

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
    news = _News()
    request.wake = news.ring
    engine.submit(request)
    try:
        while not request.ended:
            await news.wait()
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

    @property
    def usage(self) -> Usage:
        """Where the prompt's tokens came from, from the first piece on. Of the answer's tokens it counts those so far.

        Raises:
            BraidError: no piece was read yet.
        """
        if self._request is None or not self._read:
            raise BraidError("The usage is not known yet. Read the stream's first piece.")
        return self._request.usage

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

    def _next_piece(self, request: Request | None) -> str | None:
        """The text of the tokens that are there, "" if none can be shown yet; None once there are no more.

        Raises:
            BraidError: why the request failed.
        """
        if self._answer or self._closed or self._text is None or request is None:
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
        self._news: _News | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        self._engine.check_process()
        if self._closed:
            raise StopAsyncIteration
        try:
            if self._request is None:
                request = await self._engine.beside_the_loop(self._start)
                if self._request is None:  # else another task was quicker
                    self._news = _News()
                    request.wake = self._news.ring
                    self._submit(request)
            if self._news is None:
                raise RuntimeError("a stream whose request is submitted must have news")
            while True:
                piece = self._next_piece(self._request)
                if piece:
                    return piece
                if piece is None or self._answer:
                    raise StopAsyncIteration
                await self._news.wait()
        except asyncio.CancelledError:
            self._stop()
            raise

    async def aclose(self) -> None:
        """Stop generating and free what the call holds. Safe to call twice."""
        self._stop()
        if self._news:
            self._news.come()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _News:
    """Lets the tasks of an event loop know that a request has something to read. Who waits has looked before, in the
    loop's thread; what comes later is delivered there, so nothing is missed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._bell = _Bell.of(self._loop)
        self._waiting: list[asyncio.Future[None]] = []

    def ring(self) -> Callable[[], None] | None:
        """In the engine's thread; what is returned is to be called soon."""
        return self._bell.ring(self)

    def wait(self) -> "asyncio.Future[None]":
        """Done when there is news. The task may be cancelled meanwhile."""
        self._waiting.append(waiting := self._loop.create_future())
        return waiting

    def come(self) -> None:
        """In the loop's thread: there is some."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)


class _Bell:
    """Wakes tasks of one event loop from the engine's thread: with one call into the loop, however many it wakes. That
    call lets other threads run, so it comes after all tasks of a step are marked."""

    _of: ClassVar["weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell]"] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._rung: deque[_News] = deque()
        self._called = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "_Bell":
        return cls._of.get(loop) or cls._of.setdefault(loop, cls(loop))

    def ring(self, news: _News) -> Callable[[], None] | None:
        """Mark what is to come in the loop; what is returned is to be called soon. The tasks may be gone, and the loop
        too."""
        self._rung.append(news)
        return None if self._called else self._call

    def _call(self) -> None:
        if self._called:
            return
        self._called = True  # first: the loop may deliver at once
        loop = self._loop()
        try:
            if loop is None:
                raise RuntimeError("the loop is gone")
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # or closed: nobody reads any more, and what is kept here would keep the loop
            self._called = False
            self._rung.clear()

    def _deliver(self) -> None:
        self._called = False  # first: what is rung from now on calls again
        while self._rung:
            self._rung.popleft().come()


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
    documents, by_token = None, None
    if outcome.shares is not None:
        documents, by_token = sources(request.composition, outcome.shares, _pieces(engine, request))
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
        sources=documents,
        token_sources=by_token,
        fidelity=request.fidelity,
        stop_string=text.stop_string,
    )


def _pieces(engine: Engine, request: Request) -> list[str]:
    """What each token adds to the text."""
    text = AnswerText(engine.layout, (), request.params.stop_ids if request.params else ())
    pieces = [text.feed(token) for token in request.tokens]
    return [*pieces[:-1], pieces[-1] + text.end()]
