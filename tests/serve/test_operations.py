"""Health, metrics, the log, clients that go away, and how a server ends."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from braidsdk import Braid, Stats
from braidsdk.cli.serve import key_of
from braidsdk.errors import InputError
from braidsdk.serve.metrics import Metrics
from braidsdk.serve.run import bind
from braidsdk.testing import FakeBraid

COUNT = [{"role": "user", "content": "Count on."}]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": COUNT, "max_tokens": 4_000, **more}


def test_ready_says_whether_it_can_answer(served: Any) -> None:
    assert served.http.get("/ready").json() == {"status": "ready"}
    served.braid.close()
    assert served.http.get("/ready").status_code == 503
    assert served.http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/ready", "/metrics"])
def test_a_slow_store_does_not_keep_others_waiting(path: str, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go, stats = threading.Event(), threading.Event(), Braid.stats

    def slow(braid: Braid) -> Stats:
        reached.set()
        assert go.wait(30)
        return stats(braid)

    monkeypatch.setattr(Braid, "stats", slow)
    found: list[int] = []
    asked = threading.Thread(target=lambda: found.append(httpx.get(f"{served.url}{path}", timeout=30).status_code))
    asked.start()
    try:
        assert reached.wait(30)
        assert served.http.get("/health", timeout=10).status_code == 200
    finally:
        go.set()
        asked.join()
    assert found == [200]


def value(metrics: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_metrics_count_what_happened(served: Any, ask: Callable[..., httpx.Response]) -> None:
    usage = [ask("What?", braid={"chunks": ["aistonia"]}).json()["usage"] for _ in range(2)]
    ask("What?", n=3)
    text = served.http.get("/metrics").text
    for source in ("exact", "composed", "computed", "repaired"):
        want = sum(each["braid"][source] for each in usage)
        assert value(text, f'braid_prompt_tokens_by_source_total{{source="{source}"}}') == want
    assert value(text, "braid_generation_tokens_total") == sum(each["completion_tokens"] for each in usage)
    assert value(text, 'braid_request_success_total{finished_reason="stop"}') == 2
    assert value(text, 'braid_http_errors_total{status="400"}') == 1
    assert value(text, "braid_time_to_first_token_seconds_count") == 2
    assert value(text, "braid_num_requests_running") == 0
    assert 0 < value(text, "braid_kv_cache_usage_perc") < 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(stream: bool, served: Any, until: Callable[..., None]) -> None:
    with httpx.Client(base_url=served.url, timeout=30 if stream else 0.2) as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body())
    until(lambda: not served.braid.stats().running)
    generated = value(served.http.get("/metrics").text, "braid_generation_tokens_total")
    assert generated == 0, "no answer was completed"


def test_a_full_queue_is_told(serve: Callable[..., Any], until: Callable[..., None]) -> None:
    one = 16 * 4_300  # bytes of KV memory that a request takes
    served = serve(FakeBraid(lambda *_: "word " * 1_000, max_queue=1, pool_bytes=3 * one // 2))
    statuses: list[int] = []
    headers: list[str | None] = []

    def post(n: int) -> None:
        content = [{"role": "user", "content": f"{n}?"}]
        with httpx.Client(base_url=served.url, timeout=60) as http:
            found = http.post("/v1/chat/completions", json=body(messages=content))
            statuses.append(found.status_code)
            headers.append(found.headers.get("Retry-After"))

    threads = [threading.Thread(target=post, args=(n,)) for n in range(12)]
    for each in threads:
        each.start()
    until(lambda: 429 in statuses)
    for each in threads:
        each.join()
    assert set(statuses) == {200, 429}
    assert {each for status, each in zip(statuses, headers, strict=True) if status == 429} == {"1"}


def test_the_log_names_routes_and_no_text(
    served: Any, ask: Callable[..., httpx.Response], caplog: pytest.LogCaptureFixture, until: Callable[..., None]
) -> None:
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "braidsdk.serve.guard"]

    caplog.set_level(logging.INFO, "braidsdk.serve")
    ask("A secret question?")
    served.http.get("/v1/chunks/secret-name?after=secret-query")
    until(lambda: len(lines()) == 2)  # a line follows its response
    assert re.fullmatch(r"POST /v1/chat/completions 200 [\d.]+ ms", lines()[0])
    assert re.fullmatch(r"GET /v1/chunks/\{chunk:path\} 404 [\d.]+ ms", lines()[1])
    assert "secret" not in caplog.text


def test_an_error_that_nobody_expected_shows_nothing(
    served: Any, ask: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Braid, "compose", fails)
    found = ask("What?")
    assert found.status_code == 500
    assert found.json()["error"]["code"] == "internal_error"
    assert "secret" not in found.text


# how it listens


def test_pieces_of_an_answer_are_sent_at_once(monkeypatch: pytest.MonkeyPatch, served: Any) -> None:
    """asyncio switches Nagle's algorithm off for sockets whose protocol is named, and for no others."""
    set_on: list[bool] = []
    honest = asyncio.base_events._set_nodelay  # type: ignore[attr-defined]

    def looking(connection: socket.socket) -> None:
        honest(connection)
        set_on.append(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))

    monkeypatch.setattr("asyncio.base_events._set_nodelay", looking)
    served.http.get("/health")
    assert set_on == [True]


def test_a_port_that_is_taken_is_told() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(InputError, match="host and port"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="host and port"):
        bind("no.such.host.invalid", 0)


def test_an_error_in_the_middle_of_a_stream_is_in_the_log_and_not_in_the_stream(
    ask: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Metrics, "answered", fails)
    found = ask("What?", stream=True)
    assert json.loads(found.text.split("data: ")[-1])["error"]["code"] == "internal_error"
    assert "secret" not in found.text
    assert "ZeroDivisionError: a secret" in caplog.text


# the command


class Running:
    """`braid serve` in a process of its own."""

    def __init__(self, tmp_path: Path, *options: str) -> None:
        command = [str(Path(sys.executable).parent / "braid"), "serve", "--port", "0", "--store", str(tmp_path / "s")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stderr
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                break

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


LONG = {"model": "braid-tiny", "max_tokens": 700, "messages": [{"role": "user", "content": "Say it."}], "stream": True}
"""braid-tiny may end its answer sooner; a stop id can't be sent, so it is asked for the longest."""


@pytest.fixture
def running(tmp_path: Path) -> Any:
    found = Running(tmp_path)
    yield found
    found.process.kill()
    found.process.communicate()


def test_the_command_serves_the_embedded_model_and_ends_at_a_signal(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=30) as http:
        text = "The capital of Aistonia is Flubarg."
        assert http.post("/v1/chunks", json={"text": text, "name": "a"}).status_code == 201
        messages = [{"role": "user", "content": "What is the capital of Aistonia?"}]
        asked = {"model": "braid-tiny", "messages": messages, "braid": {"chunks": ["a"]}}
        assert http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"] == "Flubarg."
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == (0, "")


def test_running_answers_end_before_the_server_does(running: Running) -> None:
    with (
        httpx.Client(base_url=running.url, timeout=30) as http,
        http.stream("POST", "/v1/chat/completions", json=LONG) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"] in ("stop", "length")
    assert running.end() == (0, "")


def test_the_command_says_which_extra_it_needs(tmp_path: Path) -> None:
    script = "import sys; sys.modules['uvicorn'] = None; sys.argv = ['braid', 'serve']; "
    script += "from braidsdk.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'pip install "braidsdk[serve]"' in done.stderr


@pytest.mark.parametrize("keys", ["", "  ", "a-key=", "a-key=="])
def test_the_command_starts_with_no_key_that_is_not_whole(keys: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "braid"), "serve", "--port", "0", "--store", str(tmp_path)]
    environment = {**os.environ, "BRAID_API_KEYS": keys}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert "Listening" not in done.stderr
    assert "a-key" not in done.stderr


def test_a_key_of_the_command_may_hold_equals_signs() -> None:
    assert key_of("abc==tenant", "default") == ("abc=", "tenant")
    assert key_of("abc", "default") == ("abc", "default")
