"""OpenAI's own client, unchanged, against a live server."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

RULES = "You answer questions from the documents."
AISTONIA = "The capital of Aistonia is Flubarg."


@pytest.fixture
def client(served: Any) -> Any:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_example_of_the_documentation_runs(run_example: Callable[[str], str]) -> None:
    text, cached = run_example("client.chat.completions").rsplit(maxsplit=1)
    assert text == f"What is the capital of Aistonia? | {AISTONIA}"
    assert int(cached) > len(AISTONIA)


MESSAGES: Any = [{"role": "system", "content": RULES}, {"role": "user", "content": "What is it?"}]


def test_a_chat_is_answered(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES)
    (choice,) = answer.choices
    assert choice.message.content == "What is it? | "
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    usage: Any = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > len(RULES), "the system prompt is a chunk, though nobody said so"
    assert usage.prompt_tokens_details.cache_write_tokens == 0
    assert sum(usage.braid.values()) == usage.prompt_tokens
    assert answer.timings["prompt_n"] + answer.timings["cache_n"] == usage.prompt_tokens  # type: ignore[attr-defined]


def test_a_stream_has_the_same_text_and_tells_its_usage(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="fake", messages=MESSAGES)
    options: Any = {"include_usage": True}
    parts = list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True, stream_options=options))
    assert {part.id for part in parts} == {parts[0].id}
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert text == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 2) + ["stop"]
    assert parts[-1].choices == []
    assert parts[-1].usage
    assert whole.usage
    assert parts[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    without = list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True))
    assert all(part.usage is None for part in without)
    assert all(part.choices for part in without)


def test_many_at_once_from_an_event_loop(served: Any) -> None:
    async def ask(client: AsyncOpenAI, n: int) -> str | None:
        messages: Any = [{"role": "user", "content": f"Number {n}?"}]
        answer = await client.chat.completions.create(model="fake", messages=messages)
        return answer.choices[0].message.content

    async def all_of_them() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, n) for n in range(20)))

    assert asyncio.run(all_of_them()) == [f"Number {n}? | " for n in range(20)]


def test_documents_come_as_chunk_parts_as_texts_and_beside_the_messages(client: OpenAI) -> None:
    parts = [{"type": "chunk", "chunk": "aistonia"}, {"type": "text", "text": "What?"}]
    texts = [{"type": "text", "text": f" {AISTONIA}\n"}, {"type": "text", "text": "What?"}]
    apart: Any = [MESSAGES[0], {"role": "user", "content": AISTONIA}, {"role": "user", "content": "What?"}]
    found = []
    for messages, body in (
        ([MESSAGES[0], {"role": "user", "content": parts}], {}),
        ([MESSAGES[0], {"role": "user", "content": texts}], {}),
        (apart, {}),
        ([MESSAGES[0], {"role": "user", "content": "What?"}], {"braid": {"chunks": ["aistonia"]}}),
    ):
        answer: Any = client.chat.completions.create(model="fake", messages=messages, extra_body=body)
        assert answer.choices[0].message.content == f"What? | {AISTONIA}"
        found.append(answer.usage)
    computed = [usage.braid["computed"] for usage in found]
    assert computed[0] > len(AISTONIA) > computed[1], "the first computes its entry"
    assert computed[1:] == [computed[1]] * 3, "it is the same chunk, however it is named"
    assert len({usage.prompt_tokens for usage in found}) == 1


def test_a_conversation_goes_on(client: OpenAI) -> None:
    messages: Any = [*MESSAGES]
    for turn in range(3):
        answer = client.chat.completions.create(model="fake", messages=messages)
        message = answer.choices[0].message
        usage: Any = answer.usage
        assert usage.braid["computed"] < 60, "past turns stay resident"
        messages += [message.model_dump(), {"role": "user", "content": f"And {turn}?"}]
    assert message.content == "And 1? | "


def test_sampling_options_reach_the_engine(served: Any, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=4)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("What", "length")
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, stop=["is"], max_tokens=50)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("What ", "stop")
    for options in ({"temperature": 0.7, "seed": 3}, {"top_p": 0.5}, {"temperature": 0}):
        client.chat.completions.create(model="fake", messages=MESSAGES, **options)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="repetition_penalty"):
        client.chat.completions.create(model="fake", messages=MESSAGES, extra_body={"repetition_penalty": 0})


def test_what_is_not_there_is_refused_by_name(client: OpenAI) -> None:
    for name, value in {
        "n": 2,
        "logprobs": True,
        "response_format": {"type": "json_object"},
        "tools": [],
        "logit_bias": {"1": 2},
        "presence_penalty": 0.5,
        "store": True,
        "unheard_of": 1,
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="fake", messages=MESSAGES, extra_body={name: value})
        assert name in str(caught.value)
        assert caught.value.param
        assert caught.value.param.startswith(name)


def test_errors_have_the_class_that_the_client_knows(served: Any, client: OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="model must be 'fake'"):
        create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="fake", messages=MESSAGES, extra_body={"braid": {"chunks": ["nobody"]}})
    assert caught.value.code == "chunk_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="fake", messages=[{"role": "user", "content": "long " * 100_000}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="user's message"):
        create(model="fake", messages=[{"role": "system", "content": RULES}])
    with pytest.raises(openai.BadRequestError, match="white space"):
        create(model="fake", messages=[{"role": "user", "content": "  "}])
    served.braid.close()
    with pytest.raises(openai.InternalServerError) as closed:
        create(model="fake", messages=MESSAGES)
    assert closed.value.status_code == 503


def test_the_model_is_listed_with_its_window(served: Any, client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "fake"
    assert model.max_model_len == served.braid.window  # type: ignore[attr-defined]
    assert client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("else")


def test_what_a_client_marks_is_registered(served: Any, client: OpenAI) -> None:
    mark = {"type": "ephemeral"}
    system = [{"type": "text", "text": "New rules.", "cache_control": mark}]
    content: Any = [
        {"type": "text", "text": "A new document."},
        {"type": "text", "text": "Another one.", "cache_control": mark},
        {"type": "text", "text": "Not this one."},
        {"type": "text", "text": "What?"},
    ]
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    answer = client.chat.completions.create(model="fake", messages=messages)
    assert answer.choices[0].message.content == "What? | New rules. | A new document. | Another one. | Not this one."
    texts = [chunk.text for chunk in served.braid.chunks.list()]
    assert [text in texts for text in ("New rules.", "A new document.", "Another one.", "Not this one.")] == [
        1,
        1,
        1,
        0,
    ]
    usage: Any = answer.usage
    assert usage.prompt_tokens_details.cache_write_tokens >= len("New rules.A new document.Another one.")
    usage = client.chat.completions.create(model="fake", messages=messages).usage
    assert usage.prompt_tokens_details.cache_write_tokens == 0


def test_a_salt_isolates(client: OpenAI) -> None:
    content: Any = [{"type": "text", "text": AISTONIA}, {"type": "text", "text": "What?"}]
    messages: Any = [{"role": "user", "content": content}]
    for body, computed in (({}, True), ({}, False), ({"cache_salt": "a"}, True), ({"cache_salt": "a"}, False)):
        usage: Any = client.chat.completions.create(model="fake", messages=messages, extra_body=body).usage
        assert (usage.braid["computed"] > len(AISTONIA)) == computed


def test_an_answer_says_where_it_came_from_if_it_is_asked(client: OpenAI) -> None:
    body = {"braid": {"chunks": ["aistonia", "belmora"], "mode": "isolated", "sources": True, "explain": True}}
    answer: Any = client.chat.completions.create(model="fake", messages=MESSAGES, extra_body=body)
    assert answer.braid["mode"] == "isolated"
    assert {source["name"] for source in answer.braid["sources"]} == {"aistonia", "belmora"}
    assert [row["label"] for row in answer.braid["explanation"]] == ["rules", "aistonia", "belmora"]
