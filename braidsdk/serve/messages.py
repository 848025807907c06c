"""Messages of a chat API, as what is composed: chunks, a conversation's past, and a question.

    system message(s)                       the anchor, and texts after it
    user message(s) before the first answer documents, and at last the first question
    assistant, user, assistant ...          the past
    the last user message                   the question

A text that equals a registered chunk is that chunk; see `braidsdk.Inline`. Messages are OpenAI's; Anthropic's are
translated to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from braidsdk import Inline
from braidsdk.serve.problems import Problem
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM

MOST_CHUNKS = 4096
"""Chunks or parts that a message, or a list, may have."""


class Strict(BaseModel):
    """A body or a part of one. A field that is not known is refused, since nothing would come of it."""

    model_config = ConfigDict(extra="forbid")


class CacheControl(Strict):
    """Anthropic's mark: what stands up to here shall be cached. It stays until it is deleted, whatever `ttl` says."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextPart(Strict):
    """A text."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    cache_control: CacheControl | None = None


class ChunkPart(Strict):
    """A registered chunk, by name or id."""

    type: Literal["chunk"]
    chunk: str


class PlainText(Strict):
    """The text of a document."""

    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class DocumentPart(Strict):
    """Anthropic's document. It is never a question, and never a system prompt."""

    type: Literal["document"]
    source: PlainText
    cache_control: CacheControl | None = None


Part = TextPart | DocumentPart | ChunkPart


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[Annotated[Part, Field(discriminator="type")]], Field(max_length=MOST_CHUNKS)] | None
    ) = None
    name: None = None
    reasoning_content: str | None = None  # of an answer that is sent back; templates leave past thoughts out
    refusal: None = None  # this and what follows: empty fields of an answer that is sent back
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def parts(self) -> list[Part]:
        """Its content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content or []


@dataclass(frozen=True)
class Prompt:
    """What messages ask for.

    Attributes:
        chunks: what is composed: names, ids and texts. Of two texts the first may be a level-0 one.
        cached: how many of them, from the first, shall be registered if they are texts.
        history: the past, as `Context.ask` takes it.
        question: the question.
    """

    chunks: tuple[str | Inline, ...]
    cached: int
    history: tuple[dict[str, str], ...]
    question: str


def prompt_of(messages: Sequence[Message], chunks: Sequence[str] = (), *, param: str = "messages") -> Prompt:
    """Read a conversation.

    Args:
        messages: at least one.
        chunks: names or ids of more chunks, which stand after the system prompt.
        param: the field that they came in, for what is refused.

    Raises:
        Problem: roles or contents are not of this form.
    """
    systems = 0
    while systems < len(messages) and messages[systems].role in ("system", "developer"):
        systems += 1
    turns = _turns(messages[systems:], param)
    composed: list[str | Inline] = []
    marks = [0]
    for message in messages[:systems]:
        for part in message.parts:
            _add(composed, marks, part, LEVEL_CONTEXT if composed else LEVEL_SYSTEM)
    composed += chunks
    first = [part for message in turns[0] for part in message.parts]
    if not first or not isinstance(first[-1], TextPart):
        raise Problem(400, "The user's message must end with a text, the question; got none.", param=param)
    for part in first[:-1]:
        _add(composed, marks, part, LEVEL_CONTEXT)
    later = [_texts(turn, param) for turn in turns[1:]]
    if any(text.cache_control for text in (first[-1], *chain.from_iterable(later))):
        marks.append(len(composed))  # turns are never stored, but what stands before them is
    asked = [first[-1].text, *("\n".join(text.text for text in texts) for texts in later)]
    roles = ("user", "assistant")
    history = tuple({"role": roles[at % 2], "content": text} for at, text in enumerate(asked[:-1]))
    return Prompt(tuple(composed), marks[-1], history, asked[-1])


def _add(composed: list[str | Inline], marks: list[int], part: Part, level: int) -> None:
    """Add a part to what is composed, and note a mark on it."""
    if isinstance(part, ChunkPart):
        composed.append(part.chunk)
        return
    composed.append(Inline(part.text, level) if isinstance(part, TextPart) else Inline(part.source.data))
    if part.cache_control:
        marks.append(len(composed))


def _turns(messages: Sequence[Message], param: str) -> list[list[Message]]:
    """Messages of users and assistants in turn; several of one role that follow each other are one turn.

    Raises:
        Problem: the first or last is not a user's, or a system message comes late.
    """
    turns: list[list[Message]] = []
    for message in messages:
        if message.role in ("system", "developer"):
            why = f"A {message.role}'s message must stand before all others; got one after a {turns[-1][0].role}'s."
            raise Problem(400, why, param=param)
        if turns and turns[-1][0].role == message.role:
            turns[-1].append(message)
        else:
            turns.append([message])
    if not turns or turns[0][0].role != "user" or turns[-1][0].role != "user":
        raise Problem(
            400, "After system messages a conversation must begin and end with a user's message.", param=param
        )
    return turns


def _texts(turn: Sequence[Message], param: str) -> list[TextPart]:
    """The texts of a later turn.

    Raises:
        Problem: it holds a chunk or a document.
    """
    texts = []
    for part in (part for message in turn for part in message.parts):
        if not isinstance(part, TextPart):
            message = f"A {part.type} must stand in the first user message, or in braid.chunks; got one later."
            raise Problem(400, message, param=param)
        texts.append(part)
    return texts
