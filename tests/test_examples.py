"""Every example runs, from the clone, as a user would start it, and does what its first line says."""

import asyncio
import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from braidsdk import Braid, Context

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

# FastAPI, uvicorn and httpx are imported where they are used: machines that run the `gpu` tests alone may lack them.

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, store: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, "BRAID_STORE": str(store)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


EXPECTED = {
    "quickstart.py": ["Flubarg.", "Plonk.", "0 to compute"],
    "reload.py": ["Troick. ("],
    "sources.py": ["Plonk.", "% belmora", "'Pl"],
    "transformers_generate.py": ["braidsdk: Flubarg.", "greedy: Flubarg.", "beam search: Flubarg."],
}
OTHERS = {"chat.py", "folder.py", "retriever.py", "server.py"}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*EXPECTED, *OTHERS}


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path) -> None:
    out = run(name, tmp_path)
    assert all(words in out for words in EXPECTED[name]), out


def test_the_retriever_chooses_other_chunks_for_each_question_and_all_come_from_the_cache(tmp_path: Path) -> None:
    out = run("retriever.py", tmp_path)
    rows = re.findall(r"\? (\w+)\. \((.*): (\d+) tokens from the cache, (\d+) computed\)", out)
    assert [answer for answer, *_ in rows] == ["Troick", "Droune", "Slemune", "Jassik"], out
    assert len({chosen for _, chosen, *_ in rows}) == len(rows)
    assert all(int(computed) < 20 < int(cached) for *_, cached, computed in rows)


def test_a_conversation_computes_what_is_new_and_after_a_change_of_documents_its_turns(tmp_path: Path) -> None:
    out = run("chat.py", tmp_path)
    rows = re.findall(r"^(\w+)\.  \((\d+) tokens from the cache, (\d+) computed\)$", out, re.MULTILINE)
    assert [answer for answer, *_ in rows] == ["Flubarg", "Droune", "Quorra", "Troick", "Tathulo"], out
    cached, computed = ([int(row[column]) for row in rows] for column in (1, 2))
    assert cached[0] < cached[1] < cached[2] < cached[4]
    assert max(computed[:3] + computed[4:]) < 25 < computed[3], "the turns so far are computed once more"


def test_after_one_file_changed_only_that_one_is_computed(tmp_path: Path) -> None:
    out = run("folder.py", tmp_path)
    to_compute = [int(found) for found in re.findall(r"(\d+) to compute", out)]
    tokens = [int(found) for found in re.findall(r"chunks of (\d+) tokens", out)]
    assert to_compute[0] == tokens[0]
    assert 0 < to_compute[1] < tokens[1]
    assert out.splitlines()[-1] == "Cravenna."


@pytest.fixture(scope="module")
def server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("server_example", EXAMPLES / "server.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(server: ModuleType, store: Path) -> Iterator["TestClient"]:
    from fastapi.testclient import TestClient

    with TestClient(server.create_app()) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRAID_STORE", str(tmp_path))
    return tmp_path


def test_the_server_streams_answers_over_the_documents_that_were_asked_for(client: "TestClient") -> None:
    for documents in (["belmora", "aistonia"], ["aistonia"]):
        asked = {"question": "What is the capital of Aistonia?", "documents": documents}
        with client.stream("POST", "/ask", json=asked) as response:
            assert response.status_code == 200
            assert "".join(response.iter_text()) == "Flubarg."


def test_the_server_composes_in_a_thread_and_not_in_the_event_loop(
    client: "TestClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composing tokenizes and reads the store: in the loop it would hold up every other request."""
    in_loop: list[bool] = []
    compose = Braid.compose

    def watched(self: Braid, *arguments: Any, **options: Any) -> Context:
        in_loop.append(runs_in_event_loop())
        return compose(self, *arguments, **options)

    monkeypatch.setattr(Braid, "compose", watched)
    asked = {"question": "What is the capital of Aistonia?", "documents": ["aistonia"]}
    assert client.post("/ask", json=asked).text == "Flubarg."
    assert in_loop == [False]


def runs_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def test_the_server_says_what_is_wrong_with_a_request(client: "TestClient") -> None:
    misspelt = client.post("/ask", json={"question": "What is the capital?", "documents": ["aistona"]})
    empty = client.post("/ask", json={"question": " ", "documents": ["aistonia"]})
    incomplete = client.post("/ask", json={"documents": ["aistonia"]})
    assert (misspelt.status_code, empty.status_code, incomplete.status_code) == (400, 400, 422)
    assert "Did you mean 'aistonia'?" in misspelt.text


@contextmanager
def serving(app: "FastAPI") -> Iterator[str]:
    """Its address, while a real server runs in a thread: disconnecting is a matter of sockets."""
    import uvicorn

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # who connects before the server runs waits for it
        running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def test_a_client_that_goes_away_stops_generation(server: ModuleType, store: Path, random_checkpoint: Path) -> None:
    """An answer that ended leaves its keys resident for a next turn; one that was stopped leaves nothing."""
    import httpx

    app = server.create_app(str(random_checkpoint))
    asked = {"question": "What is the capital?", "documents": ["aistonia", "belmora"]}
    with serving(app) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.post("/ask", json={**asked, "max_new_tokens": 1}).status_code == 200
        before = app.state.braid.stats().pool_used_bytes
        with client.stream("POST", "/ask", json={**asked, "max_new_tokens": 1_900}) as response:
            arriving = response.iter_raw()
            next(arriving)  # kept: dropping the iterator closes the connection, perhaps before the look that follows
            while app.state.braid.stats().pool_used_bytes == before:
                sleep(0.001)
        deadline = monotonic() + 30
        while app.state.braid.stats().pool_used_bytes != before:
            assert monotonic() < deadline, "generation went on"
            sleep(0.01)
