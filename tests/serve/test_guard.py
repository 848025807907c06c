"""Keys and their namespaces; bodies and heads that are too large or can't be read."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from braidsdk.errors import InputError
from braidsdk.serve import LOOPBACK, Settings
from braidsdk.serve.problems import Problem
from braidsdk.store import ChunkStore
from braidsdk.testing import FakeBraid

DOCS = ("aistonia", "belmora")
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "What?"}]}


def test_a_key_opens_everything_but_health_needs_none(serve: Callable[..., Any]) -> None:
    http = serve(keys={"key-1": "default"}).http
    assert http.get("/health").status_code == 200
    routes = [("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/chunks"), ("GET", "/nothing")]
    for method, path in [*routes, ("POST", "/v1/chat/completions"), ("GET", "/openapi.json"), ("GET", "/health/")]:
        for headers in ({}, {"Authorization": "Bearer key-2"}, {"Authorization": "key-1"}, {"X-API-Key": "key-"}):
            refused = http.request(method, path, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "key-1" not in refused.text
    assert http.get("/v1/models", headers={"Authorization": "bearer key-1"}).status_code == 200
    assert http.get("/v1/models", headers={"X-API-Key": "key-1"}).status_code == 200


def test_each_key_has_its_namespace(serve: Callable[..., Any]) -> None:
    http = serve(keys={"one": "first", "two": "second", "more": "second"}).http

    def of(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    made = http.post("/v1/chunks", json={"text": "A secret.", "name": "s"}, headers=of("two"))
    assert made.status_code == 201
    ident = made.json()["id"]
    body = {**CHAT, "braid": {"chunks": ["s"]}}
    for path in ("s", ident):
        assert http.get(f"/v1/chunks/{path}", headers=of("one")).status_code == 404
        assert http.delete(f"/v1/chunks/{path}", headers=of("one")).status_code == 404
        assert http.get(f"/v1/chunks/{path}", headers=of("more")).status_code == 200
    assert http.post("/v1/chat/completions", json=body, headers=of("one")).status_code == 404
    assert "A secret." in http.post("/v1/chat/completions", json=body, headers=of("two")).text
    assert http.get("/v1/chunks", headers=of("one")).json()["data"] == []
    salted = {**CHAT, "cache_salt": "x", "braid": {"chunks": ["s"]}}
    assert http.post("/v1/chat/completions", json=salted, headers=of("two")).status_code == 404


@pytest.mark.parametrize("salt", ["secret", "\x1fsecret", "/secret", "../team/secret"])
@pytest.mark.parametrize("other", ["team/secret", "teamsecret"])
def test_no_salt_leads_into_the_namespace_of_another_key(salt: str, other: str, serve: Callable[..., Any]) -> None:
    http = serve(keys={"one": "team", "two": other}).http
    http.post("/v1/chunks", json={"text": "A secret.", "name": "s"}, headers={"X-API-Key": "two"})
    salted = {**CHAT, "cache_salt": salt, "braid": {"chunks": ["s"]}}
    assert http.post("/v1/chat/completions", json=salted, headers={"X-API-Key": "one"}).status_code == 404


def test_a_key_has_its_namespace_whichever_the_braid_has(serve: Callable[..., Any]) -> None:
    served = serve(FakeBraid(namespace="a"), keys={"one": "default", "two": "a"})
    served.braid.register("A secret.", name="s")
    assert served.http.get("/v1/chunks/s", headers={"X-API-Key": "one"}).status_code == 404
    assert served.http.get("/v1/chunks/s", headers={"X-API-Key": "two"}).status_code == 200


@pytest.mark.parametrize("namespace", ["", "x" * 129, "team\x1fsecret"])
def test_a_namespace_that_can_not_be_salted_is_refused(namespace: str) -> None:
    for settings in ({"namespace": namespace}, {"keys": {"key": namespace}}):
        with pytest.raises(InputError, match="Namespaces of a server"):
            Settings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["", "  ", " key", "schl\u00fcssel"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="API keys"):
        Settings(keys={key: "default"})


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_before_it_is_held(chunked: bool, serve: Callable[..., Any]) -> None:
    served = serve(max_body_bytes=100_000)
    before, started = psutil.Process().memory_info().rss, time.monotonic()

    def parts() -> Any:
        for _ in range(1_000):
            yield b"x" * 2**20

    try:
        length = {} if chunked else {"Content-Length": str(1_000 * 2**20)}
        found = served.http.post("/v1/chat/completions", content=parts(), headers=length)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
    except httpx.WriteError:
        pass  # it was hung up on, which a client that goes on sending sees
    assert time.monotonic() - started < 20, "it was not read to its end"
    assert psutil.Process().memory_info().rss - before < 50 * 2**20
    assert served.http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_large_headers_are_refused(served: Any) -> None:
    for size in (17_000, 65_536):
        assert served.http.get("/health", headers={"X-Long": "a" * size}).status_code in (400, 431)
    assert served.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        json.dumps({**CHAT, "messages": {}}).encode(),
        json.dumps({**CHAT, "temperature": float("nan")}).encode(),
        json.dumps({**CHAT, "max_tokens": 10**400}).encode(),
        json.dumps({**CHAT, "n": 10**9}).encode(),
        json.dumps({**CHAT, "seed": -1}).encode(),
        json.dumps({**CHAT, "stop": ["a"] * 17}).encode(),
        json.dumps({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
    ],
)
def test_a_body_that_can_not_be_read_is_refused_at_once(body: bytes, served: Any) -> None:
    started = time.monotonic()
    found = served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("path", "root", "anthropics"),
    [
        ("/v1/messages", "", True),
        ("/v1/messages/count_tokens", "", True),
        ("/llm/v1/messages", "/llm", True),
        ("/v1/messages_too", "", False),
        ("/v1/chat/completions", "", False),
    ],
)
def test_an_error_has_the_shape_of_the_api_of_its_path(path: str, root: str, anthropics: bool) -> None:
    response = Problem(404, "It is not there.").response({"type": "http", "path": path, "root_path": root})
    assert ("type" in json.loads(bytes(response.body))) == anthropics


def test_what_is_no_http_is_hung_up_on(served: Any) -> None:
    with socket.create_connection(("127.0.0.1", served.http.base_url.port)) as raw:
        raw.sendall(b"GET /" + b"a" * 200_000)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert served.http.get("/health").status_code == 200


def test_a_request_whose_body_never_came_whole_is_not_carried_out(served: Any, until: Callable[..., None]) -> None:
    for name in DOCS:
        with socket.create_connection(("127.0.0.1", served.http.base_url.port)) as raw:
            raw.sendall(f"DELETE /v1/chunks/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
            raw.sendall(b"{" if name == "aistonia" else b"123456789")
            if name != "aistonia":
                assert raw.recv(20).startswith(b"HTTP/1.1 200")
    until(lambda: len(served.braid.chunks) == 2)
    assert served.braid.chunks.get("aistonia")


def test_a_server_without_keys_answers_to_names_of_its_own_machine(serve: Callable[..., Any]) -> None:
    http = serve(hosts=LOOPBACK).http
    port = http.base_url.port
    for host in ("127.0.0.1", f"127.0.0.1:{port}", f"LocalHost:{port}", "[::1]", f"[::1]:{port}"):
        assert http.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost:80:90"):
        refused = http.get("/v1/models", headers={"Host": host})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "unknown_host")


def test_a_body_that_never_ends_does_not_hold_up_the_server(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braidsdk.serve.guard.BODY_S", 0.2)
    served = serve()
    with socket.create_connection(("127.0.0.1", served.http.base_url.port)) as raw:
        raw.sendall(b"POST /v1/chunks HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_what_is_refused_at_the_door_is_counted(serve: Callable[..., Any]) -> None:
    http = serve(keys={"one": "default"}).http
    assert http.get("/v1/models").status_code == 401
    metrics = http.get("/metrics", headers={"X-API-Key": "one"}).text
    assert 'braid_http_errors_total{status="401"} 1.0' in metrics


def test_salts_leave_nothing_behind(serve: Callable[..., Any], tmp_path: Path) -> None:
    served = serve(FakeBraid(store=tmp_path / "store"))
    for n in range(5):
        assert served.http.post("/v1/chat/completions", json={**CHAT, "cache_salt": f"salt-{n}"}).status_code == 200
    assert served.http.post("/v1/chat/completions", json=CHAT).status_code == 200
    served.braid.close()
    with ChunkStore(tmp_path / "store") as store:
        kept = store.recall_all("")
    assert any("misses:default" in name for name in kept)
    assert not any("salt" in name for name in kept)


def test_a_salt_and_a_mark_do_not_go_together(served: Any) -> None:
    content = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Q"}]
    body = {**CHAT, "messages": [{"role": "user", "content": content}], "cache_salt": "a"}
    refused = served.http.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")
    assert len(served.braid.chunks) == 3


def test_parts_and_chunks_are_bounded(served: Any) -> None:
    parts = [{"type": "text", "text": "x"}] * 5_000
    for body in (
        {**CHAT, "messages": [{"role": "user", "content": parts}]},
        {**CHAT, "braid": {"chunks": ["rules"] * 5_000}},
    ):
        assert served.http.post("/v1/chat/completions", json=body).status_code == 400
    assert served.http.post("/v1/explain", json={"chunks": ["rules"] * 5_000}).status_code == 400
