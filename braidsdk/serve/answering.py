"""How a request of any API is answered: checked, started, and read whole or in pieces."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar

from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import Field

from braidsdk import Answer, AsyncStream, Braid, Chunk, Context, Explanation, Inline
from braidsdk.serve.messages import MOST_CHUNKS, Prompt, Strict
from braidsdk.serve.metrics import Metrics
from braidsdk.serve.problems import Problem
from braidsdk.serve.tenants import Tenants
from braidsdk.serve.thoughts import Kind, Thoughts
from braidsdk.types import LEVEL_SYSTEM

T = TypeVar("T")


class BraidOptions(Strict):
    """What only this server knows.

    Attributes:
        chunks: names or ids of chunks that stand after the system prompt.
        mode: how they are composed, as `Braid.compose` takes it.
        sources: whether the answer says how much attention it gave to each document.
        explain: whether the answer says what was cached and what was not.
    """

    chunks: Annotated[tuple[str, ...], Field(max_length=MOST_CHUNKS)] = ()
    mode: str | None = None
    sources: bool = False
    explain: bool = False


@dataclass(frozen=True)
class Asked:
    """A request, whatever API it came by.

    Attributes:
        prompt: chunks, past and question.
        most: the most tokens of the answer; None is the server's default, or what the window leaves.
        sampling: other keywords of `ask`.
        options: see `BraidOptions`.
        salt: gives the request a namespace of its own.
    """

    prompt: Prompt
    most: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    options: BraidOptions = field(default_factory=BraidOptions)
    salt: str | None = None


def sampling_of(temperature: float | None, **shape: float | None) -> dict[str, Any]:
    """Keywords of `ask`. Without a temperature an answer is greedy, unless another option of sampling is given: then it
    is 1, as in the clouds' APIs.

    Args:
        temperature: what the client gives.
        shape: other options of sampling; None is not given.
    """
    sampled = any(value is not None for value in shape.values())
    return {**shape, "temperature": 1.0 if sampled and temperature is None else temperature}


class Answering:
    """Starts answers."""

    def __init__(self, tenants: Tenants, metrics: Metrics, *, model: str, default_tokens: int) -> None:
        """Over an engine.

        Args:
            tenants: the Braid of each namespace.
            metrics: counts.
            model: what clients call the model.
            default_tokens: the most tokens of an answer for which a client names no limit.
        """
        self.tenants, self.metrics, self.model = tenants, metrics, model
        self._default_tokens = default_tokens

    def check_model(self, model: str) -> None:
        """Check that a client asks for the model that is here.

        Raises:
            Problem: it does not.
        """
        if model != self.model:
            message = f"model must be {self.model!r}, which this server runs; got {model[:200]!r}."
            raise Problem(404, message, code="model_not_found", param="model")

    def braid_of(self, request: Request, salt: str | None = None) -> Braid:
        """The Braid of a caller."""
        namespace = request.state.namespace
        return self.tenants[namespace] if salt is None else self.tenants.salted(namespace, salt)

    async def start(self, request: Request, asked: Asked) -> "Running":
        """Start to answer, and wait for the first piece: what is refused raises here, before any status is sent.

        Raises:
            BraidError: why it is refused.
            Problem: the client went away.
        """
        if asked.salt is not None and asked.prompt.cached:
            message = "cache_control must not come with cache_salt: nobody else could see or delete what it registers."
            raise Problem(400, message, param="cache_salt")
        braid = self.braid_of(request, asked.salt)
        running = await run_sync(partial(self._prepare, braid, asked))
        running.first = await unless_gone(request, anext(running.stream, ""))
        return running

    async def count(self, request: Request, asked: Asked) -> int:
        """How many tokens a prompt has. Nothing is registered, and nothing computed.

        Raises:
            BraidError: why it is refused.
        """
        braid, prompt = self.braid_of(request, asked.salt), asked.prompt

        def work() -> int:
            context = braid.compose(prompt.chunks, mode=asked.options.mode)
            return len(context.prompt_ids(prompt.question, history=prompt.history))

        return await run_sync(work)

    def _prepare(self, braid: Braid, asked: Asked) -> "Running":
        """Check a request; register what the client wants cached. Runs in a thread."""
        prompt = asked.prompt
        chunks: list[str | Inline | Chunk] = list(prompt.chunks)
        written = 0
        for place, each in enumerate(chunks[: prompt.cached]):
            if isinstance(each, Inline):
                known = braid.chunks.resolve([each], inline=True)[0].id
                chunks[place] = chunk = braid.register(each.text, level=each.level)
                # A system prompt is computed when it is registered, a document when it is first asked about.
                written += 0 if known or each.level != LEVEL_SYSTEM else len(chunk.token_ids)
        context = braid.compose(chunks, mode=asked.options.mode)
        most = asked.most
        if most is None:
            taken = len(context.prompt_ids(prompt.question, history=prompt.history))
            most = max(1, min(self._default_tokens, braid.window - taken))
        explanation = context.explain() if asked.options.explain else None
        stream = context.astream(
            prompt.question,
            history=prompt.history,
            sources=asked.options.sources,
            max_new_tokens=most,
            **asked.sampling,
        )
        thoughts = Thoughts(opened=braid.opens_thought)
        return Running(context, stream, thoughts, self.metrics, written, explanation)


@dataclass
class Running:
    """An answer on its way.

    Attributes:
        context: what it is over.
        stream: its text.
        thoughts: tells thoughts from the answer.
        metrics: counts it when it is complete.
        written: tokens that were stored to prepare it.
        explanation: what came from the cache, if the client asked.
        first: its first piece.
    """

    context: Context
    stream: AsyncStream
    thoughts: Thoughts
    metrics: Metrics
    written: int
    explanation: Explanation | None
    first: str = ""

    @property
    def answer(self) -> Answer:
        """The whole answer, once it was read to its end."""
        return self.stream.answer

    async def pieces(self) -> AsyncGenerator[tuple[Kind, str], None]:
        """Thoughts and text, in pieces. To stop reading ends the request."""
        async with aclosing(self.stream):
            for each in self.thoughts.feed(self.first):
                yield each
            async for piece in self.stream:
                for each in self.thoughts.feed(piece):
                    yield each
            for each in self.thoughts.end():
                yield each
            self.metrics.answered(self.answer)

    async def whole(self, request: Request) -> tuple[str, str]:
        """All thoughts, and all text.

        Raises:
            BraidError: the answer failed.
            Problem: the client went away.
        """
        return await unless_gone(request, self._whole())

    async def _whole(self) -> tuple[str, str]:
        found: dict[Kind, list[str]] = {"thought": [], "text": []}
        async with aclosing(self.pieces()) as pieces:
            async for kind, piece in pieces:
                found[kind].append(piece)
        return "".join(found["thought"]), "".join(found["text"])


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled if the client goes away.

    Raises:
        Problem: it went away. Nobody reads that.
    """
    running = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise Problem(499, "The client went away.", code="client_closed_request")
        return running.result()
    finally:
        for each in (running, gone):
            each.cancel()
        await asyncio.gather(running, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
