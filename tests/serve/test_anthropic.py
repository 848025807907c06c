"""Anthropic's own client, unchanged, against a live server."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic

from braidsdk.testing import FakeBraid

RULES = "You answer questions from the documents."
AISTONIA = "The capital of Aistonia is Flubarg."
MARK: Any = {"type": "ephemeral"}


def text(content: str, **more: Any) -> Any:
    return {"type": "text", "text": content, **more}


def document(content: str, **more: Any) -> Any:
    return {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": content}, **more}


def user(content: Any) -> Any:
    return {"role": "user", "content": content}


@pytest.fixture
def client(served: Any) -> Any:
    with Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def create(client: Anthropic) -> Callable[..., Any]:
    """Ask with what every request needs."""

    def ask(content: Any = "What is it?", **options: Any) -> Any:
        return client.messages.create(**{"model": "fake", "max_tokens": 200, "messages": [user(content)], **options})

    return ask


def prompt_tokens(usage: Any) -> int:
    return int(usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens)


def test_the_example_of_the_documentation_runs(run_example: Callable[[str], str]) -> None:
    said, created, read = run_example("anthropic").rsplit(maxsplit=2)
    assert said == f"What is the capital of Aistonia? | {AISTONIA}"
    assert int(created) > len(RULES) + len(AISTONIA)
    assert int(read) == 0


def test_a_message_is_answered(create: Callable[..., Any]) -> None:
    message = create(system=RULES)
    assert message.to_dict()["content"] == [{"type": "text", "text": "What is it? | "}]
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")
    assert message.braid["mode"] == "anchored"
    assert message.timings["cache_n"] == message.usage.cache_read_input_tokens


def test_the_usage_has_three_kinds_of_input_tokens(create: Callable[..., Any], client: Anthropic) -> None:
    content = [document("A new document.", cache_control=MARK), text("What?")]
    system = [text("New rules.", cache_control=MARK)]
    first, second = (create(content, system=system).usage for _ in range(2))
    assert first.cache_read_input_tokens == 0
    assert first.cache_creation_input_tokens > len("New rules.A new document.")
    assert second.cache_read_input_tokens == first.cache_creation_input_tokens
    assert second.cache_creation_input_tokens == 0
    assert first.input_tokens == second.input_tokens < len("What?") + 5
    for usage in (first, second):
        assert prompt_tokens(usage) == sum(usage.braid.values())
        assert usage.output_tokens > len("What? | A new document.")


def test_tokens_are_counted_and_nothing_is_registered(
    create: Callable[..., Any], client: Anthropic, served: Any
) -> None:
    messages = [user([document("A new one.", cache_control=MARK), text("Q?")]), {"role": "assistant", "content": "A"}]
    messages.append(user("And?"))
    asked: Any = {
        "model": "fake",
        "system": RULES,
        "messages": messages,
        "extra_body": {"braid": {"chunks": ["belmora"]}},
    }
    counted = client.messages.count_tokens(**asked).input_tokens
    assert len(served.braid.chunks) == 3
    assert counted == prompt_tokens(create(**asked).usage)
    assert len(served.braid.chunks) == 4


def test_a_raw_stream_has_the_events_of_the_api(create: Callable[..., Any]) -> None:
    whole = create(system=RULES)
    events = create(system=RULES, stream=True)
    assert events.response.headers["content-type"].startswith("text/event-stream")
    start, *middle, delta, stop = list(events)
    assert (start.type, delta.type, stop.type) == ("message_start", "message_delta", "message_stop")
    assert (start.message.content, start.message.stop_reason) == ([], None)
    assert prompt_tokens(start.message.usage) == prompt_tokens(delta.usage) == prompt_tokens(whole.usage)
    assert start.message.usage.cache_read_input_tokens == whole.usage.cache_read_input_tokens > len(RULES)
    assert delta.usage.output_tokens == whole.usage.output_tokens
    kinds = [each.type for each in middle]
    assert kinds == ["content_block_start", *["content_block_delta"] * (len(kinds) - 2), "content_block_stop"]
    assert "".join(each.delta.text for each in middle[1:-1]) == whole.content[0].text
    assert {each.index for each in middle} == {0}
    assert delta.delta.stop_reason == "end_turn"


def test_the_clients_own_stream_gives_text_and_the_final_message(client: Anthropic, create: Callable[..., Any]) -> None:
    asked: Any = {"model": "fake", "max_tokens": 200, "system": RULES, "messages": [user("What?")]}
    whole = create(**asked)
    with client.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.to_dict()) == ("end_turn", whole.usage.to_dict())


def test_an_empty_answer_has_no_block(serve: Callable[..., Any]) -> None:
    asked: Any = {"model": "fake", "max_tokens": 9, "messages": [user("What?")]}
    with Anthropic(base_url=serve(FakeBraid(lambda *_: "")).url, api_key="none") as client:
        assert client.messages.create(**asked).content == []
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
    assert (final.content, final.stop_reason, final.usage.output_tokens) == ([], "end_turn", 1)


def test_many_at_once_from_an_event_loop(served: Any) -> None:
    async def ask(client: AsyncAnthropic, n: int) -> list[Any]:
        asked: Any = {"model": "fake", "messages": [user(f"Number {n}?")]}
        whole = await client.messages.create(**asked, max_tokens=99)
        async with client.messages.stream(**asked, max_tokens=99) as stream:
            final = await stream.get_final_message()
        count = await client.messages.count_tokens(**asked)
        assert count.input_tokens == prompt_tokens(whole.usage)
        return [whole.content[0].to_dict(), {"type": "text", "text": final.content[0].text}]  # type: ignore[union-attr]

    async def all_of_them() -> list[list[Any]]:
        async with AsyncAnthropic(base_url=served.url, api_key="none") as client:
            return await asyncio.gather(*(ask(client, n) for n in range(10)))

    assert asyncio.run(all_of_them()) == [[{"type": "text", "text": f"Number {n}? | "}] * 2 for n in range(10)]


def test_documents_come_as_blocks_as_chunks_and_beside_the_messages(create: Callable[..., Any]) -> None:
    found = []
    for content, body in (
        ([{"type": "chunk", "chunk": "aistonia"}, text("What?")], {}),
        ([document(f" {AISTONIA}\n"), text("What?")], {}),
        ([text(AISTONIA), text("What?")], {}),
        ("What?", {"braid": {"chunks": ["aistonia"]}}),
    ):
        for system in (RULES, [text(RULES)], [{"type": "chunk", "chunk": "rules"}]):
            message = create(content, system=system, extra_body=body)
            assert message.content[0].text == f"What? | {AISTONIA}"
            found.append(message.usage)
    assert found[0].cache_creation_input_tokens > len(AISTONIA), "the first computes its entry"
    assert {usage.cache_read_input_tokens for usage in found[1:]} == {prompt_tokens(found[0]) - found[0].input_tokens}


@pytest.mark.parametrize(
    ("marked", "registered"),
    [
        ({}, []),
        ({"system": [text("S.", cache_control=MARK)]}, ["S."]),
        ({"first": document("D.", cache_control={**MARK, "ttl": "5m"})}, ["S.", "D."]),
        ({"question": text("Q?", cache_control={**MARK, "ttl": "1h"})}, ["S.", "D.", "E."]),
        ({"cache_control": MARK}, ["S.", "D.", "E."]),
    ],
)
def test_what_a_client_marks_is_registered(
    marked: dict[str, Any], registered: list[str], create: Callable[..., Any], served: Any
) -> None:
    parts = {"system": [text("S.")], "first": document("D."), "question": text("Q?"), **marked}
    content = [parts.pop("first"), text("E."), parts.pop("question")]
    assert create(content, **parts).content[0].text == "Q? | S. | D. | E."
    assert [chunk.text for chunk in served.braid.chunks.list()][3:] == registered


def test_options_of_sampling_reach_the_engine(create: Callable[..., Any]) -> None:
    message = create(max_tokens=4)
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("What", "max_tokens", None)
    for options in ({"temperature": 0.7}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0, "top_k": 3}):
        assert create(extra_body=options).stop_reason == "end_turn"
    assert create(metadata={"user_id": "somebody"}, stop_sequences=[]).stop_reason == "end_turn"


def test_the_stop_sequence_that_ended_the_answer_is_named(create: Callable[..., Any], client: Anthropic) -> None:
    asked: Any = {"model": "fake", "max_tokens": 50, "messages": [user("What is it?")], "stop_sequences": ["zz", "is"]}
    message = create(**asked)
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("What ", "stop_sequence", "is")
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "is")


def test_thoughts_are_blocks_of_their_own(serve: Callable[..., Any]) -> None:
    served = serve(FakeBraid(lambda *_: "<think>\nHm, well.\n</think>\n\nYes."))
    want = [{"type": "thinking", "thinking": "Hm, well.", "signature": ""}, {"type": "text", "text": "Yes."}]
    asked: Any = {"model": "fake", "max_tokens": 99, "messages": [user("So?")]}
    with Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        message = client.messages.create(**asked)
        assert message.to_dict()["content"] == want
        with client.messages.stream(**asked) as stream:
            kinds = [each.type for each in stream]
            final = stream.get_final_message()
        assert [block.to_dict() for block in final.content] == want
        assert {"thinking", "text"} <= set(kinds)
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
        for content in (message.content, final.content, [block.model_dump() for block in message.content]):
            asked["messages"] = [user("So?"), {"role": "assistant", "content": content}, user("And?")]
            assert client.messages.create(**asked).stop_reason == "end_turn"
        asked["messages"] = [user([want[0], text("And?")])]
        with pytest.raises(anthropic.BadRequestError, match="a thinking block must stand in an assistant's message"):
            client.messages.create(**asked)


def test_a_conversation_goes_on(create: Callable[..., Any]) -> None:
    messages: Any = [user([document(AISTONIA), text("What is it?")])]
    for turn in range(3):
        message = create(messages=messages, system=RULES)
        messages += [{"role": "assistant", "content": message.content}, user(f"And {turn}?")]
    assert message.content[0].text == f"And 1? | {AISTONIA}"
    assert message.usage.input_tokens < 60, "past turns stay resident"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tool_choice", {"type": "auto"}),
        ("thinking", {"type": "disabled"}),
        ("container", "x"),
        ("service_tier", "auto"),
        ("output_config", {"effort": "low"}),
        ("temperature", 1.5),
        ("top_p", 0),
        ("max_tokens", 0),
        ("stop_sequences", [""]),
        ("cache_control", {"type": "for ever"}),
        ("metadata.name", {"name": "x"}),
        ("braid.best", {"best": True}),
        ("unheard_of", 1),
        ("system.0", [document("x")]),
        ("messages.0.role", [{"role": "tool", "content": "x"}]),
        ("messages.0.content.0", [user([{"type": "image", "source": {"type": "url", "url": "x"}}])]),
        ("messages.0.content.0.document.title", [user([document("x", title="y"), text("Q?")])]),
        ("messages.0.content.0.document.source.type", [user([document("x", source={"type": "file", "file_id": "x"})])]),
        ("messages.0.content", [user(7)]),
    ],
)
def test_what_is_not_there_is_refused_by_name(field: str, value: Any, create: Callable[..., Any]) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(extra_body={field.partition(".")[0]: value})
    assert caught.value.type == "invalid_request_error"
    assert caught.value.api_message
    assert caught.value.api_message.startswith(field)


def test_errors_have_the_class_that_the_client_knows(
    served: Any, client: Anthropic, create: Callable[..., Any]
) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model must be 'fake'") as model:
        create(model="claude")
    assert (model.value.type, model.value.error_code) == ("not_found_error", "model_not_found")
    with pytest.raises(anthropic.NotFoundError) as chunk:
        create(extra_body={"braid": {"chunks": ["nobody"]}})
    assert chunk.value.error_code == "chunk_not_found"
    with pytest.raises(anthropic.BadRequestError) as long:
        client.messages.count_tokens(model="fake", messages=[user("long " * 100_000)])
    assert (long.value.type, long.value.error_code) == ("invalid_request_error", "context_length_exceeded")
    with pytest.raises(anthropic.BadRequestError, match="end with a user's message"):
        create(messages=[user("Q?"), {"role": "assistant", "content": "A"}])
    with pytest.raises(anthropic.NotFoundError) as route:
        client.messages.batches.list()
    assert route.value.type == "not_found_error"
    served.braid.close()
    with pytest.raises(anthropic.InternalServerError) as closed:
        create()
    assert (closed.value.status_code, closed.value.type) == (503, "api_error")


def test_errors_of_the_guard_have_that_shape_too(serve: Callable[..., Any]) -> None:
    served = serve(keys={"key-1": "default"}, max_body_bytes=10_000)
    asked: Any = {"model": "fake", "max_tokens": 9, "messages": [user("What?")]}
    with Anthropic(base_url=served.url, api_key="key-1", max_retries=0) as client:
        assert client.messages.create(**asked).stop_reason == "end_turn"
        with pytest.raises(anthropic.APIStatusError) as large:
            client.messages.create(**{**asked, "system": "x" * 20_000})
        assert (large.value.status_code, large.value.type) == (413, "request_too_large")
    with (
        Anthropic(base_url=served.url, api_key="key-2", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError) as key,
    ):
        client.messages.count_tokens(model="fake", messages=[user("What?")])
    assert (key.value.type, key.value.error_code) == ("authentication_error", "invalid_api_key")
    assert served.http.post("/v1/chat/completions").json()["error"]["code"] == "invalid_api_key", "OpenAI's keep theirs"
    assert served.http.post("/v1/messages_too").json()["error"]["code"] == "invalid_api_key"


def test_too_little_memory_and_a_full_queue_are_told_apart(
    serve: Callable[..., Any], until: Callable[..., None]
) -> None:
    one = 16 * 4_300  # bytes of KV memory that a request takes
    served = serve(FakeBraid(lambda *_: "word " * 1_000, max_queue=1, pool_bytes=3 * one // 2))
    found: list[Any] = []

    def ask(n: int, max_tokens: int = 4_000) -> None:
        with Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=60) as client:
            try:
                client.messages.create(model="fake", max_tokens=max_tokens, messages=[user(f"{n}?")])
            except anthropic.APIStatusError as error:
                found.append(error)

    ask(0, 50_000)
    assert isinstance(found[0], anthropic.OverloadedError)
    assert (found[0].status_code, found[0].type, found[0].error_code) == (529, "overloaded_error", "kv_memory_full")
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for each in threads:
        each.start()
    until(lambda: len(found) > 1)
    for each in threads:
        each.join()
    assert {(type(each), each.type) for each in found[1:]} == {(anthropic.RateLimitError, "rate_limit_error")}
    assert 'braid_http_errors_total{status="529"} 1.0' in served.http.get("/metrics").text


def test_a_stream_that_fails_ends_with_an_error(
    served: Any, create: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = create("Count on.", max_tokens=4_000, stream=True)
    next(events)
    served.braid.close()
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(events)
    assert (caught.value.type, caught.value.error_code) == ("api_error", "shutting_down")


def test_a_client_that_goes_away_ends_its_request(served: Any, until: Callable[..., None]) -> None:
    asked = {"model": "fake", "max_tokens": 4_000, "messages": [user("Count on.")], "stream": True}
    with httpx.Client(base_url=served.url) as http, http.stream("POST", "/v1/messages", json=asked) as response:
        next(response.iter_lines())
    until(lambda: not served.braid.stats().running)
    assert "braid_generation_tokens_total 0.0" in served.http.get("/metrics").text, "no answer was completed"
