"""A model's thoughts are told from its answer, however its text comes in pieces."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from braidsdk.serve.thoughts import Thoughts
from braidsdk.testing import FakeBraid


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize(
    ("text", "opened", "thought", "answer"),
    [
        ("Plain.", False, "", "Plain."),
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
        ("  \n<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("Hm. </think> Yes.", True, "Hm.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("<think>It is a < b, or </thin air>. ", False, "It is a < b, or </thin air>. ", ""),
        ("<think>Hm.</think>Say <think> or </think>. ", False, "Hm.", "Say <think> or </think>. "),
        ("Say <think>no</think>.", False, "", "Say <think>no</think>."),
        ("<thinking> is no mark", False, "", "<thinking> is no mark"),
        ("<thi", False, "", "<thi"),
        ("  two spaces", False, "", "  two spaces"),
        ("", False, "", ""),
        ("", True, "", ""),
        ("Hm", True, "Hm", ""),
        ("Hm </think> \n", True, "Hm", ""),
    ],
)
def test_thoughts_are_told_apart(text: str, opened: bool, thought: str, answer: str, size: int) -> None:
    thoughts, found = Thoughts(opened=opened), {"thought": "", "text": ""}
    for start in range(0, len(text), size):
        for kind, piece in thoughts.feed(text[start : start + size]):
            assert piece
            found[kind] += piece
    for kind, piece in thoughts.end():
        found[kind] += piece
    assert found == {"thought": thought, "text": answer}


def test_what_can_be_told_is_not_held_back() -> None:
    thoughts = Thoughts(opened=False)
    assert thoughts.feed("<think>Well") == [("thought", "Well")]
    assert thoughts.feed(", so") == [("thought", ", so")]
    assert thoughts.feed(" </thi") == []
    assert thoughts.feed("s") == [("thought", " </this")]
    assert thoughts.feed("</think>\n") == []
    assert thoughts.feed("Yes <") == [("text", "Yes <")]


def test_a_server_gives_thoughts_apart(serve: Callable[..., Any]) -> None:
    served = serve(FakeBraid(lambda *_: "<think>\nHm, well.\n</think>\n\nYes."))
    messages = [{"role": "user", "content": "So?"}]
    body = {"model": "fake", "messages": messages}
    message = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, well.", "Yes.")
    again = [*messages, message, {"role": "user", "content": "And?"}]
    assert served.http.post("/v1/chat/completions", json={**body, "messages": again}).status_code == 200
    lines = served.http.post("/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(each.get("reasoning_content", "") for each in deltas) == "Hm, well."
    assert "".join(each.get("content", "") for each in deltas) == "Yes."
