"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator, Field, model_validator

from braidsdk import Answer, Usage
from braidsdk.serve.answering import Answering, Asked, BraidOptions, Running, sampling_of
from braidsdk.serve.messages import (
    CacheControl,
    ChunkPart,
    DocumentPart,
    Message,
    Part,
    Prompt,
    Strict,
    TextPart,
    prompt_of,
)
from braidsdk.serve.problems import ANTHROPIC, problem_of
from braidsdk.serve.reported import origins, ours
from braidsdk.serve.responses import Json, event
from braidsdk.serve.thoughts import Kind


class TextBlock(TextPart):
    """A text, which may be one of an answer that is sent back."""

    type: Literal["text"]
    citations: None = None


class ThinkingBlock(Strict):
    """A thought of an answer that is sent back. It is left out, as templates leave out past thoughts."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


def _as_blocks(content: object) -> object:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


Block = Annotated[TextBlock | DocumentPart | ChunkPart | ThinkingBlock, Field(discriminator="type")]
Blocks = Annotated[list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]
SystemBlock = Annotated[TextBlock | ChunkPart, Field(discriminator="type")]
SystemBlocks = Annotated[list[SystemBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[SystemBlock])]


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: Blocks

    @model_validator(mode="after")
    def _thinks_if_it_is_the_models(self) -> "Turn":
        if self.role == "user" and any(isinstance(each, ThinkingBlock) for each in self.content):
            raise ValueError("a thinking block must stand in an assistant's message; got a user's")
        return self


class CountRequest(Strict):
    """A body of `count_tokens`: what a prompt is made of."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096)]
    system: SystemBlocks | None = None
    cache_control: CacheControl | None = None
    braid: BraidOptions = BraidOptions()

    def prompt(self) -> Prompt:
        """What it asks for.

        Raises:
            Problem: messages are not of this form.
        """
        messages = [Message(role="system", content=list(self.system))] if self.system else []
        for turn in self.messages:
            parts: list[Part] = [each for each in turn.content if not isinstance(each, ThinkingBlock)]
            messages.append(Message(role=turn.role, content=parts))
        found = prompt_of(messages, self.braid.chunks)
        # This mark is on the last block, so all that can be registered stands before it.
        return replace(found, cached=len(found.chunks)) if self.cache_control else found


class Metadata(Strict):
    """Who asks. It changes no answer."""

    user_id: str | None = None


class MessagesRequest(CountRequest):
    """A body of Anthropic's, and `braid`."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None = None
    stream: bool | None = False
    metadata: Metadata | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords of `ask`, without `max_new_tokens`."""
        return {**sampling_of(self.temperature, top_p=self.top_p, top_k=self.top_k), "stop": self.stop_sequences}


class Messages:
    """The routes."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self.router = APIRouter(prefix=ANTHROPIC, tags=["messages"])
        self.router.post("", response_model=None)(self.create)
        self.router.post("/count_tokens", response_model=None)(self.count)

    async def create(self, asked: MessagesRequest, request: Request) -> Json | StreamingResponse:
        """Answer a conversation, whole or in pieces."""
        self._answering.check_model(asked.model)
        wanted = Asked(asked.prompt(), asked.max_tokens, asked.sampling, asked.braid)
        reply = _Reply(self._answering.model, await self._answering.start(request, wanted))
        if asked.stream:
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return Json(await reply.whole(request))

    async def count(self, asked: CountRequest, request: Request) -> dict[str, int]:
        """How many tokens a prompt has. Nothing is registered."""
        self._answering.check_model(asked.model)
        return {"input_tokens": await self._answering.count(request, Asked(asked.prompt(), options=asked.braid))}


class _Reply:
    """The objects of one answer."""

    def __init__(self, model: str, running: Running) -> None:
        self._running = running
        self._head = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": model}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events. A client that goes away cancels this, which ends the request."""
        running = self._running
        usage = usage_of(running.stream.usage, running.written)
        empty: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield _event("message_start", message=empty)
        index, open_kind = -1, None
        async with aclosing(running.pieces()) as pieces:
            try:
                async for kind, piece in pieces:
                    if kind != open_kind:
                        if open_kind:
                            yield _event("content_block_stop", index=index)
                        index, open_kind = index + 1, kind
                        yield _event("content_block_start", index=index, content_block=_block(kind, ""))
                    delta = {"type": f"{_FIELDS[kind]}_delta", _FIELDS[kind]: piece}
                    yield _event("content_block_delta", index=index, delta=delta)
            except Exception as error:  # the status is sent already
                problem = problem_of(error)
                running.metrics.refused(problem.anthropic_status)
                yield event(problem.anthropic_body, "error")
                return
        if open_kind:
            yield _event("content_block_stop", index=index)
        usage = usage_of(running.answer.usage, running.written)
        yield _event("message_delta", delta=_end_of(running.answer), usage=usage, **ours(running))
        yield _event("message_stop")

    async def whole(self, request: Request) -> dict[str, Any]:
        """An answer that is not streamed."""
        running = self._running
        thought, text = await running.whole(request)
        said: tuple[tuple[Kind, str], ...] = (("thought", thought), ("text", text))
        return {
            **self._head,
            "content": [_block(kind, words) for kind, words in said if words],
            **_end_of(running.answer),
            "usage": usage_of(running.answer.usage, running.written),
            **ours(running),
        }


_FIELDS = {"thought": "thinking", "text": "text"}


def _event(name: str, **data: Any) -> str:
    return event({"type": name, **data}, name)


def _block(kind: Kind, words: str) -> dict[str, str]:
    """A block of an answer. Nobody signs a thought."""
    block = {"type": _FIELDS[kind], _FIELDS[kind]: words}
    return block | {"signature": ""} if kind == "thought" else block


def _end_of(answer: Answer) -> dict[str, str | None]:
    """Why an answer ended."""
    reason = "max_tokens" if answer.finish_reason == "length" else "end_turn"
    return {
        "stop_reason": reason if answer.stop_string is None else "stop_sequence",
        "stop_sequence": answer.stop_string,
    }


def usage_of(usage: Usage, written: int = 0) -> dict[str, Any]:
    """Anthropic's usage, whose three kinds of input tokens add up to the prompt, and where these came from.

    Args:
        usage: of the answer. What was stored before it counts as cached there.
        written: tokens that were stored before the answer, for its sake.
    """
    written = min(written, usage.cached_tokens)
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - usage.stored_tokens,
        "cache_creation_input_tokens": usage.stored_tokens + written,
        "cache_read_input_tokens": usage.cached_tokens - written,
        "output_tokens": usage.completion_tokens,
        "braid": origins(usage),
    }
