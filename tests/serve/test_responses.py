"""OpenAI's Responses API: OpenAI's own client, unchanged, against a live server."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from braidsdk.errors import EngineError
from braidsdk.serve.thoughts import Thoughts
from braidsdk.testing import FakeBraid

RULES = "You answer questions from the documents."
AISTONIA = "The capital of Aistonia is Flubarg."
QUESTION = {"role": "user", "content": "What is it?"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

OPENED = ["response.created", "response.in_progress"]
MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done"]
THOUGHT = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"]
CLOSED = ["content_part.done", "output_item.done"]


def names(*parts: list[str]) -> list[str]:
    return [name if name.startswith("response.") else f"response.{name}" for part in parts for name in part]


def without_repeats(events: list[Any]) -> list[str]:
    """Types of events; those that follow each other and are the same are one."""
    found: list[str] = []
    for event in events:
        if event.type not in found[-1:]:
            found.append(event.type)
    return found


@pytest.fixture
def client(served: Any) -> Any:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def respond(client: OpenAI) -> Callable[..., Any]:
    """Ask for a response: `respond("Question?", stream=True)`. Fields that the client doesn't know go along."""

    def create(asked: Any, **fields: Any) -> Any:
        return client.responses.create(model="fake", input=asked, extra_body=fields, stream=fields.get("stream", False))

    return create


@pytest.fixture
def thinker(serve: Callable[..., Any]) -> Any:
    """A client of a model that thinks."""
    served = serve(FakeBraid(lambda question, _: f"<think>\nHm, well.\n</think>\n\nYes, {question}"))
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_example_of_the_documentation_runs(run_example: Callable[[str], str]) -> None:
    run_example("client.chat.completions")
    text, cached = run_example("client.responses").rsplit(maxsplit=1)
    assert text == f"What is the capital of Aistonia? | {AISTONIA}"
    assert int(cached) > len(AISTONIA)


def test_a_question_is_answered(client: OpenAI) -> None:
    answer = client.responses.create(model="fake", input="What is it?", instructions=RULES)
    assert answer.output_text == "What is it? | "
    assert (answer.status, answer.object, answer.model) == ("completed", "response", "fake")
    assert (answer.error, answer.incomplete_details, answer.instructions) == (None, None, RULES)
    assert answer.store is False  # type: ignore[attr-defined]
    assert answer.completed_at
    assert answer.completed_at >= answer.created_at
    (message,) = answer.output
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "completed")
    usage: Any = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens == len("What is it? | ") + 1, "and the one that ends it"
    assert usage.input_tokens_details.cached_tokens > len(RULES), "instructions are a chunk, though nobody said so"
    assert usage.input_tokens_details.cache_write_tokens == 0
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert sum(usage.braid.values()) == usage.input_tokens
    assert answer.timings["prompt_n"] + answer.timings["cache_n"] == usage.input_tokens  # type: ignore[attr-defined]


def test_every_object_is_of_openais_schema(serve: Callable[..., Any]) -> None:
    for text, fields in (("Yes.", {}), ("<think>Hm.</think>Yes.", {}), ("<think>Hm.", {"max_output_tokens": 9})):
        served = serve(FakeBraid(lambda *_, text=text: text))
        body = {"model": "fake", "input": "So?", **fields}
        Response.model_validate(served.http.post("/v1/responses", json=body).json(), strict=False)
        lines = served.http.post("/v1/responses", json={**body, "stream": True}).text.split("\n\n")
        assert lines.pop() == ""
        for line in lines:
            name, data = line.split("\n")
            found = EVENT.validate_json(data.removeprefix("data: "))
            assert name == f"event: {found.type}"


def test_a_stream_has_all_events_in_order(respond: Callable[..., Any]) -> None:
    events = list(respond("What is it?", stream=True))
    assert without_repeats(events) == names(OPENED, MESSAGE, CLOSED, ["completed"])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == "What is it? | "
    created, final = events[0].response, events[-1].response
    assert (created.status, created.output, created.usage) == ("in_progress", [], None)
    assert (final.status, final.id, final.output_text) == ("completed", created.id, "What is it? | ")
    by_type = {event.type: event for event in events}
    assert by_type["response.output_text.done"].text == "What is it? | "
    assert by_type["response.content_part.done"].part.text == "What is it? | "
    assert by_type["response.output_item.done"].item == final.output[0]
    added = by_type["response.output_item.added"].item
    assert (added.id, added.status, added.content) == (final.output[0].id, "in_progress", [])
    assert {event.item_id for event in deltas} == {added.id}
    whole = respond("What is it?").usage
    assert (final.usage.input_tokens, final.usage.output_tokens) == (whole.input_tokens, whole.output_tokens)


def test_the_clients_own_stream_gives_the_final_response(client: OpenAI) -> None:
    with client.responses.stream(model="fake", input="What is it?", instructions=RULES) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "What is it? | "


def test_an_event_loop_asks_and_streams(served: Any) -> None:
    async def ask(client: AsyncOpenAI, n: int) -> str:
        if n % 2:
            return (await client.responses.create(model="fake", input=f"Number {n}?")).output_text
        async with client.responses.stream(model="fake", input=f"Number {n}?") as stream:
            return (await stream.get_final_response()).output_text

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, n) for n in range(10)))

    assert asyncio.run(all_of_them()) == [f"Number {n}? | " for n in range(10)]


def test_a_thought_is_an_item_of_its_own(thinker: OpenAI) -> None:
    answer = thinker.responses.create(model="fake", input="So?")
    reasoning, message = answer.output
    assert reasoning.type == "reasoning"
    assert reasoning.content
    assert (reasoning.content[0].text, reasoning.summary, reasoning.status) == ("Hm, well.", [], "completed")
    assert message.type == "message"
    assert answer.output_text == "Yes, So?"
    events: list[Any] = list(thinker.responses.create(model="fake", input="So?", stream=True))
    assert without_repeats(events) == names(OPENED, THOUGHT, CLOSED, MESSAGE, CLOSED, ["completed"])
    thought = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(thought) == "Hm, well."
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1]
    with thinker.responses.stream(model="fake", input="So?") as stream:
        assert [item.type for item in stream.get_final_response().output] == ["reasoning", "message"]


@pytest.mark.parametrize(
    ("limit", "kinds", "cut"),
    [(10, ["reasoning"], "Hm"), (27, ["reasoning"], "Hm, well."), (34, ["reasoning", "message"], "Yes, S")],
)
def test_an_answer_that_is_cut_is_incomplete(limit: int, kinds: list[str], cut: str, thinker: OpenAI) -> None:
    answer = thinker.responses.create(model="fake", input="So?", max_output_tokens=limit)
    events: list[Any] = list(thinker.responses.create(model="fake", input="So?", max_output_tokens=limit, stream=True))
    assert events[-1].type == "response.incomplete"
    for found in (answer, events[-1].response):
        assert (found.status, found.max_output_tokens, found.completed_at) == ("incomplete", limit, None)
        assert found.incomplete_details.reason == "max_output_tokens"
        assert [item.type for item in found.output] == kinds
        assert [item.status for item in found.output] == ["completed"] * (len(kinds) - 1) + ["incomplete"]
        assert found.output[-1].content[0].text == cut
        assert found.usage.output_tokens == limit
    assert events[-2].item == events[-1].response.output[-1]


@pytest.mark.parametrize(("text", "kinds"), [("", ["message"]), ("<think>Hm.</think>", ["reasoning", "message"])])
def test_an_answer_without_text_has_an_empty_message(text: str, kinds: list[str], serve: Callable[..., Any]) -> None:
    served = serve(FakeBraid(lambda *_: text))
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.responses.create(model="fake", input="So?")
        with client.responses.stream(model="fake", input="So?") as stream:
            streamed = stream.get_final_response()
    for found in (answer, streamed):
        assert [item.type for item in found.output] == kinds
        assert (found.output_text, found.status) == ("", "completed")


def test_an_error_after_the_start_fails_the_response(
    served: Any, respond: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise EngineError("The engine has failed.")

    monkeypatch.setattr(Thoughts, "end", fails)
    *events, last = respond("What is it?", stream=True)
    assert events[-1].type == "response.output_text.delta"
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == ("server_error", "The engine has failed.")
    assert [(item.status, item.content[0].text) for item in last.response.output] == [("incomplete", "What is it? | ")]
    assert 'braid_http_errors_total{status="503"} 1.0' in served.http.get("/metrics").text
    with pytest.raises(openai.InternalServerError, match="The engine has failed"):
        respond("What is it?")


def test_documents_come_as_parts_as_messages_and_beside_the_input(respond: Callable[..., Any]) -> None:
    ask = {"type": "input_text", "text": "What?"}
    chunk = {"type": "chunk", "chunk": "aistonia"}
    system = {"role": "developer", "content": RULES}
    for items, fields in (
        ([{"role": "user", "content": [chunk, ask]}], {"instructions": RULES}),
        ([system, {"role": "user", "content": [{"type": "input_text", "text": AISTONIA}, ask]}], {}),
        ([system, {"role": "user", "content": AISTONIA}, {"type": "message", "role": "user", "content": [ask]}], {}),
        ("What?", {"instructions": RULES, "braid": {"chunks": ["aistonia"]}}),
        ([{"role": "user", "content": "What?"}], {"instructions": "", "braid": {"chunks": ["rules", "aistonia"]}}),
    ):
        answer = respond(items, **fields)
        assert answer.output_text == f"What? | {AISTONIA}"
        assert answer.usage.input_tokens_details.cached_tokens >= len(RULES)


def test_a_conversation_goes_on_with_the_items_of_earlier_responses(thinker: OpenAI, client: OpenAI) -> None:
    for each, first in ((thinker, "Yes, What is it?"), (client, "What is it? | ")):
        items: list[Any] = [QUESTION]
        for turn in range(3):
            with each.responses.stream(model="fake", input=items) as stream:
                answer = stream.get_final_response()
            assert turn or answer.output_text == first
            assert answer.usage
            assert answer.usage.braid["computed"] < 60, "past turns stay resident"  # type: ignore[attr-defined]
            items += [*answer.output, {"role": "user", "content": f"And {turn}?"}]
        assert "And 1?" in answer.output_text
        dumped = [item if isinstance(item, dict) else item.model_dump() for item in items]
        assert "And 2?" in each.responses.create(model="fake", input=dumped).output_text


def test_thoughts_that_are_sent_back_are_not_read(client: OpenAI) -> None:
    thought: Any = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "T"}],
    }
    said: Any = {"role": "assistant", "content": "Flubarg."}
    then: Any = {"role": "user", "content": "And then?"}
    question: Any = QUESTION
    tokens = []
    for past in ([said], [thought, said], [thought, thought, said]):
        answer = client.responses.create(model="fake", input=[question, *past, then])
        assert answer.output_text == "And then? | "
        tokens.append(answer.usage and answer.usage.input_tokens)
    assert tokens == [tokens[0]] * 3
    answer = client.responses.create(model="fake", input=[question, thought, then])
    assert answer.output_text == "And then? | ", "a turn that was cut within a thought is an empty answer"


def test_what_is_said_of_the_request_comes_back(client: OpenAI) -> None:
    said: Any = {"metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
    answer = client.responses.create(
        model="fake",
        input="What is it?",
        text={"format": {"type": "text"}},
        truncation="disabled",
        store=False,
        temperature=0.5,
        **said,
    )
    assert {name: getattr(answer, name) for name in said} == said
    assert (answer.temperature, answer.top_p, answer.truncation) == (0.5, 1.0, "disabled")
    assert answer.output_text == "What is it? | "
    plain = client.responses.create(model="fake", input="What is it?")
    assert (plain.metadata, plain.user, plain.temperature) == ({}, None, 0.0)
    assert client.responses.create(model="fake", input="What is it?", top_p=0.5).temperature == 1.0


def test_it_says_where_an_answer_came_from_and_a_salt_isolates(respond: Callable[..., Any]) -> None:
    braid = {"chunks": ["aistonia", "belmora"], "mode": "isolated", "sources": True, "explain": True}
    found = respond("What?", instructions=RULES, braid=braid).braid
    assert found["mode"] == "isolated"
    assert {source["name"] for source in found["sources"]} == {"aistonia", "belmora"}
    assert [row["label"] for row in found["explanation"]] == ["rules", "aistonia", "belmora"]
    content = [{"type": "input_text", "text": "A text."}, {"type": "input_text", "text": "What?"}]
    for fields, computed in (({}, True), ({}, False), ({"cache_salt": "a"}, True), ({"cache_salt": "a"}, False)):
        usage = respond([{"role": "user", "content": content}], **fields).usage
        assert (usage.braid["computed"] > len("A text.What?")) == computed


def test_what_a_client_marks_is_registered(served: Any, respond: Callable[..., Any]) -> None:
    marked = {"type": "input_text", "text": "A new document.", "cache_control": {"type": "ephemeral"}}
    usage = respond([{"role": "user", "content": [marked, {"type": "input_text", "text": "What?"}]}]).usage
    assert "A new document." in [chunk.text for chunk in served.braid.chunks.list()]
    assert usage.input_tokens_details.cache_write_tokens >= len("A new document.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", True),
        ("previous_response_id", "resp_1"),
        ("tools", []),
        ("tool_choice", "auto"),
        ("background", True),
        ("include", ["reasoning.encrypted_content"]),
        ("conversation", "conv_1"),
        ("prompt", {"id": "p"}),
        ("reasoning", {"effort": "low"}),
        ("service_tier", "flex"),
        ("max_tool_calls", 1),
        ("stream_options", {"include_obfuscation": True}),
        ("top_logprobs", 2),
        ("truncation", "auto"),
        ("text", {"format": {"type": "json_object"}}),
        ("text", {"verbosity": "low"}),
        ("max_output_tokens", 0),
        ("temperature", 3),
        ("metadata", {"a": 1}),
        ("unheard_of", 1),
    ],
)
def test_what_is_not_there_is_refused_by_name(name: str, value: Any, respond: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        respond("What is it?", **{name: value})
    assert name in str(caught.value)
    assert caught.value.param
    assert caught.value.param.startswith(name)


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([], "at least 1 item"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input_image"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}], "input_file"),
        ([{"type": "function_call_output", "call_id": "x", "output": "y"}], "function_call_output"),
        ([{"type": "item_reference", "id": "msg_1"}], "item_reference"),
        ([{"role": "tool", "content": "x"}], "role"),
        ([{"role": "user", "content": "x", "more": 1}], "more"),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, QUESTION], "refusal"),
        ([QUESTION, {"role": "system", "content": "Late."}], "before all others; got one after a user's"),
        ([QUESTION, {"role": "assistant", "content": "Yes."}], "begin and end with a user's"),
        ([QUESTION, {"type": "reasoning", "summary": []}], "begin and end with a user's"),
        ([{"role": "user", "content": [{"type": "chunk", "chunk": "aistonia"}]}], "must end with a text"),
    ],
)
def test_items_that_can_not_be_read_are_refused(items: Any, why: str, respond: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=why) as caught:
        respond(items)
    assert caught.value.param
    assert caught.value.param.startswith("input")


def test_a_refused_state_says_what_to_do(client: OpenAI) -> None:
    for fields in ({"store": True}, {"previous_response_id": "resp_1"}):
        with pytest.raises(openai.BadRequestError, match="keeps no responses: send the items of earlier ones as input"):
            client.responses.create(model="fake", input="And then?", **fields)  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_errors_have_the_class_that_the_client_knows(respond: Callable[..., Any], client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model must be 'fake'"):
        client.responses.create(model="gpt", input="What?")
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            respond("What?", braid={"chunks": ["nobody"]}, stream=stream)
        assert caught.value.code == "chunk_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        respond("long " * 100_000)
    assert refused.value.code == "context_length_exceeded"
