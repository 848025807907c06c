"""`/v1/chat/completions` and `/v1/models`: OpenAI's chat API."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar
from uuid import uuid4

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import Field, model_validator

from braidsdk import Answer, AsyncStream, Braid, Chunk, Context, Explanation, Inline
from braidsdk.serve.messages import Message, Prompt, Strict, prompt_of
from braidsdk.serve.metrics import Metrics
from braidsdk.serve.problems import Problem, problem_of
from braidsdk.serve.responses import Json, event
from braidsdk.serve.tenants import Tenants
from braidsdk.types import LEVEL_SYSTEM

T = TypeVar("T")


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Format(Strict):
    """The form of an answer."""

    type: Literal["text"]


class BraidOptions(Strict):
    """What only this server knows.

    Attributes:
        chunks: names or ids of chunks that stand after the system prompt.
        mode: how they are composed, as `Braid.compose` takes it.
        sources: whether the answer says how much attention it gave to each document.
        explain: whether the answer says what was cached and what was not.
    """

    chunks: tuple[str, ...] = ()
    mode: str | None = None
    sources: bool = False
    explain: bool = False


class ChatRequest(Strict):
    """A body of OpenAI's, and `braid`. Fields that say something about the caller (user, safety_identifier,
    prompt_cache_key, metadata) are taken, and change no answer."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    response_format: Format | None = None
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    logprobs: Literal[False] | None = False
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = False
    cache_salt: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    braid: BraidOptions = BraidOptions()

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("one of max_tokens and max_completion_tokens must be left out; got both")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must come with stream=true")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords of `ask`, without `max_new_tokens`. Without a temperature an answer is greedy, unless another option
        of sampling is given: then it is 1, as with OpenAI."""
        shape = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        sampled = any(value is not None for value in shape.values())
        return {
            **shape,
            "temperature": 1.0 if sampled and self.temperature is None else self.temperature,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop,
        }


@dataclass(frozen=True)
class Prepared:
    """A checked request.

    Attributes:
        context: what is asked.
        most: the most tokens of the answer.
        written: tokens that were stored to prepare it.
        explanation: what would come from the cache, if the client asked.
    """

    context: Context
    most: int
    written: int
    explanation: Explanation | None


class Chat:
    """The routes."""

    def __init__(self, tenants: Tenants, name: str, metrics: Metrics, default_tokens: int) -> None:
        """Routes over an engine.

        Args:
            tenants: the Braid of each namespace.
            name: what clients call the model.
            metrics: counts.
            default_tokens: the most tokens of an answer for which a client names no limit.
        """
        self._tenants, self._name, self._metrics, self._default_tokens = tenants, name, metrics, default_tokens
        self._since = int(time.time())
        self.router = APIRouter(prefix="/v1", tags=["chat"])
        self.router.get("/models")(self.models)
        self.router.get("/models/{model:path}")(self.model)
        self.router.post("/chat/completions", response_model=None)(self.complete)

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._described()]}

    async def model(self, model: str) -> dict[str, Any]:
        """The one model, by its name."""
        self._check_model(model)
        return self._described()

    async def complete(self, asked: ChatRequest, request: Request) -> Json | StreamingResponse:
        """Answer a conversation, whole or in pieces."""
        self._check_model(asked.model)
        prompt = prompt_of(asked.messages, asked.braid.chunks)
        namespace = request.state.namespace
        if asked.cache_salt is not None:
            namespace = f"{namespace}/{asked.cache_salt}"
        prepared = await run_sync(partial(self._prepare, self._tenants[namespace], asked, prompt))
        stream = prepared.context.astream(
            prompt.question,
            history=prompt.history,
            sources=asked.braid.sources,
            max_new_tokens=prepared.most,
            **asked.sampling,
        )
        reply = _Reply(self._name, prepared)
        if asked.stream:
            # The first piece is waited for here: a request that is refused then has a status.
            first = await unless_gone(request, anext(stream, ""))
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamingResponse(self._events(stream, first, reply, usage), media_type="text/event-stream")
        async with aclosing(stream):
            text = await unless_gone(request, _whole(stream))
        self._metrics.answered(stream.answer)
        return Json(reply.whole(text, stream.answer))

    def _prepare(self, braid: Braid, asked: ChatRequest, prompt: Prompt) -> Prepared:
        """Check a request; register what the client wants cached. Runs in a thread."""
        chunks: list[str | Inline | Chunk] = list(prompt.chunks)
        written = 0
        for place, each in enumerate(chunks[: prompt.cached]):
            if isinstance(each, Inline):
                known = braid.chunks.resolve([each], inline=True)[0].id
                chunks[place] = chunk = braid.register(each.text, level=each.level)
                # A system prompt is computed when it is registered, a document when it is first asked about.
                written += 0 if known or each.level != LEVEL_SYSTEM else len(chunk.token_ids)
        context = braid.compose(chunks, mode=asked.braid.mode)
        most = asked.max_completion_tokens or asked.max_tokens
        if most is None:
            taken = len(context.prompt_ids(prompt.question, history=prompt.history))
            most = max(1, min(self._default_tokens, braid.window - taken))
        return Prepared(context, most, written, context.explain() if asked.braid.explain else None)

    async def _events(self, stream: AsyncStream, first: str, reply: "_Reply", usage: bool) -> AsyncIterator[str]:
        """Server-sent events. A client that goes away cancels this, which ends the request."""
        async with aclosing(stream):
            try:
                yield event(reply.piece({"role": "assistant", "content": first}))
                async for piece in stream:
                    yield event(reply.piece({"content": piece}))
            except Exception as error:  # the status is sent already
                problem = problem_of(error)
                self._metrics.refused(problem.status)
                yield event(problem.body)
                return
            self._metrics.answered(stream.answer)
            yield event(reply.last(stream.answer))
            if usage:
                yield event(reply.usage(stream.answer))
            yield "data: [DONE]\n\n"

    def _check_model(self, model: str) -> None:
        if model != self._name:
            message = f"model must be {self._name!r}, which this server runs; got {model[:200]!r}."
            raise Problem(404, message, code="model_not_found", param="model")

    def _described(self) -> dict[str, Any]:
        braid = self._tenants.first
        return {
            "id": self._name,
            "object": "model",
            "created": self._since,
            "owned_by": "braidsdk",
            "max_model_len": braid.window,
            "dtype": str(braid.dtype).removeprefix("torch."),
        }


class _Reply:
    """The objects of one answer."""

    def __init__(self, model: str, prepared: Prepared) -> None:
        self._prepared = prepared
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}

    def piece(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A part of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, answer: Answer) -> dict[str, Any]:
        """The part that ends a stream's text."""
        return {**self.piece({}, answer.finish_reason), **self._of(answer)}

    def usage(self, answer: Answer) -> dict[str, Any]:
        """The part that a client asks for with `include_usage`."""
        part = {**self._head, "object": "chat.completion.chunk", "choices": []}
        return {**part, "usage": usage_of(answer, self._prepared.written)}

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """An answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        usage = usage_of(answer, self._prepared.written)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage, **self._of(answer)}

    def _of(self, answer: Answer) -> dict[str, Any]:
        """What only this server says: how long it took, and what was asked for in `braid`."""
        ours: dict[str, Any] = {"mode": self._prepared.context.mode}
        if answer.sources is not None:
            each = [(source.chunk.id or None, source.chunk.name, source.share) for source in answer.sources]
            ours["sources"] = [{"chunk": ident, "name": name, "share": share} for ident, name, share in each]
        if self._prepared.explanation is not None:
            ours["explanation"] = [asdict(row) for row in self._prepared.explanation.chunks]
        return {"timings": timings_of(answer), "braid": ours}


def usage_of(answer: Answer, written: int = 0) -> dict[str, Any]:
    """OpenAI's usage, and where the prompt's tokens came from.

    Args:
        answer: the answer.
        written: tokens that were stored before it was asked for.
    """
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.stored_tokens + written,
        },
        "braid": {
            "exact": usage.exact_tokens,
            "composed": usage.cached_tokens - usage.exact_tokens,
            "repaired": usage.repaired_tokens,
            "computed": usage.computed_tokens,
        },
    }


def timings_of(answer: Answer) -> dict[str, Any]:
    """How long it took, in the words of llama.cpp's server."""
    timings, usage = answer.timings, answer.usage
    rate = timings.decode_tokens_per_s
    predicted_ms = (usage.completion_tokens - 1) / rate * 1e3 if rate else 0.0
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": usage.computed_tokens + usage.repaired_tokens,
        "prompt_ms": timings.prefill_ms,
        "load_ms": timings.load_ms,
        "first_token_ms": timings.first_token_ms,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_second": rate,
    }


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


async def _whole(stream: AsyncStream) -> str:
    return "".join([piece async for piece in stream])
