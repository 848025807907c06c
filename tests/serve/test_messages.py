"""Which chunks, past and question are read from OpenAI's messages."""

from typing import Any

import pytest
from pydantic import ValidationError

from braidsdk import Inline
from braidsdk.serve.messages import Message, prompt_of
from braidsdk.serve.problems import Problem

MARK = {"type": "ephemeral"}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def chunk(name: str) -> dict[str, Any]:
    return {"type": "chunk", "chunk": name}


def document(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": content}, **more}


def read(*messages: tuple[str, Any], chunks: tuple[str, ...] = ()) -> Any:
    return prompt_of([Message(role=role, content=content) for role, content in messages], chunks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("messages", "composed", "history", "question"),
    [
        ([("user", "Q")], (), [], "Q"),
        ([("system", "S"), ("user", "Q")], (Inline("S", 0),), [], "Q"),
        ([("developer", "S"), ("system", "T"), ("user", "Q")], (Inline("S", 0), Inline("T", 1)), [], "Q"),
        ([("system", [chunk("s"), text("T")]), ("user", "Q")], ("s", Inline("T", 1)), [], "Q"),
        ([("user", [chunk("d"), text("e"), text("Q")])], ("d", Inline("e")), [], "Q"),
        ([("user", "d"), ("user", [chunk("e")]), ("user", "Q")], (Inline("d"), "e"), [], "Q"),
        ([("user", "Q"), ("assistant", "A"), ("user", "R")], (), ["Q", "A"], "R"),
        (
            [("user", [chunk("d"), text("Q")]), ("assistant", [text("A")]), ("user", [text("R"), text("S")])],
            ("d",),
            ["Q", "A"],
            "R\nS",
        ),
        ([("user", "Q"), ("assistant", None), ("user", "R")], (), ["Q", ""], "R"),
        ([("user", [document("d"), text("Q")])], (Inline("d"),), [], "Q"),
        ([("system", [document("d")]), ("user", "Q")], (Inline("d"),), [], "Q"),
    ],
)
def test_messages_are_read(messages: Any, composed: Any, history: list[str], question: str) -> None:
    found = read(*messages)
    assert (found.chunks, found.question) == (composed, question)
    assert [message["content"] for message in found.history] == history
    assert [message["role"] for message in found.history] == ["user", "assistant"] * (len(history) // 2)


def test_chunks_beside_the_messages_follow_the_system_prompt() -> None:
    found = read(("system", "S"), ("user", [text("d"), text("Q")]), chunks=("a", "b"))
    assert found.chunks == (Inline("S", 0), "a", "b", Inline("d"))


def test_a_mark_reaches_back_to_the_start() -> None:
    marked = [text("d"), text("e", cache_control=MARK), text("f"), text("Q")]
    assert read(("system", "S"), ("user", marked)).cached == 3
    assert read(("system", [text("S", cache_control=MARK)]), ("user", "Q"), chunks=("a",)).cached == 1
    assert read(("system", "S"), ("user", [document("d", cache_control=MARK), text("Q")])).cached == 2
    assert read(("system", "S"), ("user", "Q")).cached == 0


def test_a_mark_on_a_turn_reaches_back_over_all_documents() -> None:
    marked = text("Q", cache_control={**MARK, "ttl": "1h"})
    assert read(("system", "S"), ("user", [text("d"), marked])).cached == 2
    assert read(("system", "S"), ("user", [text("d"), text("P")]), ("assistant", "A"), ("user", [marked])).cached == 2


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([("system", "S")], "begin and end with a user"),
        ([("assistant", "A")], "begin and end with a user"),
        ([("user", "Q"), ("assistant", "A")], "begin and end with a user"),
        ([("user", "Q"), ("system", "S")], "before all others"),
        ([("user", [chunk("d")])], "end with a text"),
        ([("user", [])], "end with a text"),
        ([("user", [document("d")])], "end with a text"),
        ([("user", "Q"), ("assistant", "A"), ("user", [chunk("d"), text("R")])], "chunk must stand in the first"),
        ([("user", "Q"), ("assistant", "A"), ("user", [document("d"), text("R")])], "document must stand in the first"),
    ],
)
def test_what_can_not_be_read_is_refused(messages: Any, why: str) -> None:
    with pytest.raises(Problem, match=why) as caught:
        read(*messages)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "for ever"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {**MARK, "ttl": "1d"}}]},
        {"role": "user", "content": [document("d", title="x")]},
        {"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "x"}}]},
        {"role": "user", "content": "x", "more": 1},
        {"role": "user", "content": 7},
    ],
)
def test_what_is_not_supported_is_refused(message: Any) -> None:
    with pytest.raises(ValidationError):
        Message(**message)
