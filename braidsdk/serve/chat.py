"""`/v1/chat/completions` and `/v1/models`: OpenAI's chat API."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import Field, model_validator

from braidsdk import Answer
from braidsdk.serve.answering import Answering, Asked, Running, sampling_of
from braidsdk.serve.messages import Message, Strict, prompt_of
from braidsdk.serve.openai_common import OpenAIRequest, TextFormat
from braidsdk.serve.problems import problem_of
from braidsdk.serve.reported import cache_counts, origins, ours
from braidsdk.serve.responses import Json, event

_log = logging.getLogger(__name__)


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(OpenAIRequest):
    """A body of OpenAI's chat API, and what only this server takes."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    response_format: TextFormat | None = None
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    logprobs: Literal[False] | None = False
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = False

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("one of max_tokens and max_completion_tokens must be left out; got both")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must come with stream=true")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords of `ask`, without `max_new_tokens`."""
        return {
            **sampling_of(self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p),
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop,
        }


class Chat:
    """The routes."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
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
        self._answering.check_model(model)
        return self._described()

    async def complete(self, asked: ChatRequest, request: Request) -> Json | StreamingResponse:
        """Answer a conversation, whole or in pieces."""
        self._answering.check_model(asked.model)
        prompt = prompt_of(asked.messages, asked.braid.chunks)
        most = asked.max_completion_tokens or asked.max_tokens
        running = await self._answering.start(
            request, Asked(prompt, most, asked.sampling, asked.braid, asked.cache_salt)
        )
        reply = _Reply(self._answering.model, running)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamingResponse(reply.events(usage), media_type="text/event-stream")
        return Json(await reply.whole(request))

    def _described(self) -> dict[str, Any]:
        braid = self._answering.tenants.first
        return {
            "id": self._answering.model,
            "object": "model",
            "created": self._since,
            "owned_by": "braidsdk",
            "max_model_len": braid.window,
            "dtype": str(braid.dtype).removeprefix("torch."),
        }


class _Reply:
    """The objects of one answer."""

    def __init__(self, model: str, running: Running) -> None:
        self._running = running
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}

    async def events(self, usage: bool) -> AsyncIterator[str]:
        """Server-sent events. A client that goes away cancels this, which ends the request."""
        running = self._running
        yield event(self._piece({"role": "assistant", "content": ""}))
        async with aclosing(running.pieces()) as pieces:
            try:
                async for kind, piece in pieces:
                    yield event(self._piece({_FIELDS[kind]: piece}))
            except Exception as error:  # the status is sent already
                problem = problem_of(error)
                if problem.status == 500:
                    _log.exception("an answer failed")
                running.metrics.refused(problem.status)
                yield event(problem.body)
                return
        yield event({**self._piece({}, running.answer.finish_reason), **ours(running)})
        if usage:
            part = {**self._head, "object": "chat.completion.chunk", "choices": []}
            yield event({**part, "usage": usage_of(running.answer, running.written)})
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> dict[str, Any]:
        """An answer that is not streamed."""
        running = self._running
        thought, text = await running.whole(request)
        message = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": running.answer.finish_reason}
        usage = usage_of(running.answer, running.written)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage, **ours(running)}

    def _piece(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A part of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


_FIELDS = {"thought": "reasoning_content", "text": "content"}


def usage_of(answer: Answer, written: int) -> dict[str, Any]:
    """OpenAI's usage of a chat, and where the prompt's tokens came from.

    Args:
        answer: the answer.
        written: tokens that were stored before it was asked for.
    """
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": cache_counts(answer, written),
        "braid": origins(usage),
    }
