"""`/v1/responses`: OpenAI's Responses API, without its state: a client sends all earlier items with each request.

instructions                      the system prompt
input items of type message       as the messages of a chat; see `braidsdk.serve.messages`
input items of type reasoning     nothing: templates leave past thoughts out
"""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator, Field

from braidsdk import Answer
from braidsdk.serve.answering import Answering, Asked, Running, sampling_of
from braidsdk.serve.messages import ChunkPart, Message, Strict, TextPart, prompt_of
from braidsdk.serve.openai_common import OpenAIRequest, TextFormat
from braidsdk.serve.problems import Problem, problem_of
from braidsdk.serve.reported import cache_counts, origins, ours
from braidsdk.serve.responses import Json, event
from braidsdk.serve.thoughts import Kind

Status = Literal["in_progress", "completed", "incomplete"]
Nothing = Annotated[list[Any], Field(max_length=0)]


class InputText(TextPart):
    """A text of a client's."""

    type: Literal["input_text"]


class OutputText(TextPart):
    """A text of an earlier answer, with the empty fields that it has there."""

    type: Literal["output_text"]
    annotations: Nothing | None = None
    logprobs: Nothing | None = None
    parsed: None = None  # the Python client adds it


Part = Annotated[InputText | OutputText | ChunkPart, Field(discriminator="type")]


def _as_parts(content: object) -> object:
    """A plain text is one part."""
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputMessage(Strict):
    """A message, or an earlier answer that is sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]
    id: str | None = None
    status: Status | None = None
    phase: None = None


class ReasoningItem(Strict):
    """What the model thought before an earlier answer. It is sent back with the answer, and not read."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


Item = Annotated[InputMessage | ReasoningItem, Field(discriminator="type")]


def _as_items(value: object) -> object:
    """A plain text is a user's message, and an item without a type is a message."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        return value
    return [{"type": "message"} | each if isinstance(each, dict) else each for each in value]


class TextOptions(Strict):
    """How an answer is written."""

    format: TextFormat | None = None


class ResponsesRequest(OpenAIRequest):
    """A body of OpenAI's Responses API, and what only this server takes."""

    input: Annotated[
        list[Item],
        BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
        Field(min_length=1, max_length=4096),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    store: bool | None = None
    previous_response_id: str | None = None

    @property
    def messages(self) -> list[Message]:
        """What a chat would say. A thought opens the assistant's turn, also if no answer came after it."""
        found = [Message(role="system", content=self.instructions)] if self.instructions else []
        for item in self.input:
            if isinstance(item, ReasoningItem):
                found.append(Message(role="assistant", content=[]))
            else:
                found.append(Message(role=item.role, content=[*item.content]))
        return found

    def check_stateless(self) -> None:
        """Check that nothing is asked for which needs memory of earlier requests.

        Raises:
            Problem: something is.
        """
        remedy = "This server keeps no responses: send the items of earlier ones as input."
        for name, wrong, must in (
            ("store", self.store, "must be false or left out; got true"),
            ("previous_response_id", self.previous_response_id is not None, "must be left out; got one"),
        ):
            if wrong:
                raise Problem(400, f"{name} {must}. {remedy}", code="unsupported_parameter", param=name)


class Responses:
    """The route."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self.router = APIRouter(prefix="/v1", tags=["responses"])
        self.router.post("/responses", response_model=None)(self.create)

    async def create(self, asked: ResponsesRequest, request: Request) -> Json | StreamingResponse:
        """Answer, whole or as events."""
        self._answering.check_model(asked.model)
        asked.check_stateless()
        sampling = sampling_of(asked.temperature, top_p=asked.top_p)
        prompt = prompt_of(asked.messages, asked.braid.chunks, param="input")
        running = await self._answering.start(
            request, Asked(prompt, asked.max_output_tokens, sampling, asked.braid, asked.cache_salt)
        )
        reply = _Reply(asked, sampling, running)
        if asked.stream:
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return Json(await reply.whole(request))


@dataclass
class _Item:
    """One item of the output: what the model thought, or its message.

    Attributes:
        kind: which of them.
        place: where in the output.
        text: all of it that has come.
    """

    kind: Kind
    place: int
    text: str = ""
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'rs' if self.kind == 'thought' else 'msg'}_{uuid4().hex}"

    @property
    def part(self) -> dict[str, Any]:
        """Its one part."""
        if self.kind == "thought":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def shown(self, status: Status) -> dict[str, Any]:
        """The whole item. It has no part before it has ended."""
        content = [] if status == "in_progress" else [self.part]
        head = {"id": self.id, "status": status, "content": content}
        if self.kind == "thought":
            return {"type": "reasoning", **head, "summary": []}
        return {"type": "message", "role": "assistant", **head}


class _Reply:
    """The objects of one answer."""

    def __init__(self, asked: ResponsesRequest, sampling: dict[str, Any], running: Running) -> None:
        self._running = running
        self._number = 0
        self._items: list[_Item] = []
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": asked.model,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "temperature": sampling["temperature"] or 0.0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "user": asked.user,
            "safety_identifier": asked.safety_identifier,
            "prompt_cache_key": asked.prompt_cache_key,
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "store": False,
            "previous_response_id": None,
            "background": False,
            "reasoning": None,
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
        }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events. A client that goes away cancels this, which ends the request."""
        running, items = self._running, self._items
        async with aclosing(running.pieces()) as pieces:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, response=self._response("in_progress"))
            try:
                async for kind, piece in pieces:
                    if not items or items[-1].kind != kind:
                        for each in self._closed("completed"):
                            yield each
                        for each in self._opened(kind):
                            yield each
                    items[-1].text += piece
                    yield self._event(f"response.{_STREAMS[kind]}.delta", items[-1], delta=piece)
            except Exception as error:  # the status is sent already
                problem = problem_of(error)
                running.metrics.refused(problem.status)
                why = {"code": "server_error", "message": str(problem)}
                failed = self._response("failed", error=why, output=self._output("incomplete"))
                yield self._event("response.failed", response=failed)
                return
        if self._lacks_message():
            for each in (*self._closed("completed"), *self._opened("text")):
                yield each
        response = self._finished()
        for each in self._closed(response["status"]):
            yield each
        yield self._event(f"response.{response['status']}", response=response)

    async def whole(self, request: Request) -> dict[str, Any]:
        """An answer that is not streamed."""
        thought, text = await self._running.whole(request)
        if thought:
            self._items.append(_Item("thought", 0, thought))
        if text or self._lacks_message():
            self._items.append(_Item("text", len(self._items), text))
        return self._finished()

    def _lacks_message(self) -> bool:
        """Whether an empty message is missing: a model that has ended, or has not even thought, has said nothing."""
        if not self._items:
            return True
        return self._items[-1].kind == "thought" and self._running.answer.finish_reason == "stop"

    def _opened(self, kind: Kind) -> Iterator[str]:
        """Events of a new item."""
        self._items.append(item := _Item(kind, len(self._items)))
        yield self._event("response.output_item.added", output_index=item.place, item=item.shown("in_progress"))
        yield self._event("response.content_part.added", item, part=item.part)

    def _closed(self, status: Status) -> Iterator[str]:
        """Events of the end of the last item, if there is one."""
        for item in self._items[-1:]:
            yield self._event(f"response.{_STREAMS[item.kind]}.done", item, text=item.text)
            yield self._event("response.content_part.done", item, part=item.part)
            yield self._event("response.output_item.done", output_index=item.place, item=item.shown(status))

    def _event(self, name: str, of: _Item | None = None, **data: Any) -> str:
        """The next event, of an item's part if one is given."""
        where: dict[str, Any] = {}
        if of is not None:
            where = {"item_id": of.id, "output_index": of.place, "content_index": 0}
            if name.startswith("response.output_text."):
                where["logprobs"] = []
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **where, **data}, name)

    def _finished(self) -> dict[str, Any]:
        """The response, once the answer is complete or was cut."""
        answer = self._running.answer
        status: Status = "incomplete" if answer.finish_reason == "length" else "completed"
        usage = usage_of(answer, self._running.written)
        return {**self._response(status, output=self._output(status), usage=usage), **ours(self._running)}

    def _output(self, status: Status) -> list[dict[str, Any]]:
        """All items. The last one has a status of its own."""
        return [item.shown("completed") for item in self._items[:-1]] + [
            item.shown(status) for item in self._items[-1:]
        ]

    def _response(self, status: Status | Literal["failed"], **more: Any) -> dict[str, Any]:
        """The response as it is now."""
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "error": None,
            "output": [],
            "usage": None,
            **more,
        }


_STREAMS = {"thought": "reasoning_text", "text": "output_text"}


def usage_of(answer: Answer, written: int) -> dict[str, Any]:
    """OpenAI's usage of a response, and where the prompt's tokens came from.

    Args:
        answer: the answer.
        written: tokens that were stored before it was asked for.
    """
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": cache_counts(answer, written),
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},  # a text's thoughts are found, not their tokens
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "braid": origins(answer.usage),
    }
