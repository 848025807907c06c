"""A server on loopback, in a thread, over a model without weights."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

import httpx

from braidsdk import Braid
from braidsdk.serve import Settings, create_app
from braidsdk.serve.run import Server, bind, config
from braidsdk.testing import FakeBraid

RULES = "You answer questions from the documents."
DOCS = {"aistonia": "The capital of Aistonia is Flubarg.", "belmora": "The capital of Belmora is Plonk."}
WAIT_S = 30.0


def answering(question: str, documents: tuple[str, ...]) -> str:
    """What the fake model answers: what it was given, so that tests see it."""
    if question.startswith("Count"):
        return " ".join(map(str, range(2000)))
    return f"{question} | {' | '.join(each for each in documents if each != RULES)}"


class Served:
    """A server that runs.

    Attributes:
        url: where.
        braid: its Braid, of the default namespace.
        http: a client.
    """

    def __init__(self, braid: Braid, settings: Settings) -> None:
        self.braid = braid
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = Server(config(create_app(braid, settings)))
        self._server.capture_signals = _nothing  # type: ignore[method-assign]  # signals are the main thread's
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S)
        until(lambda: self._server.started)

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


class _nothing:  # noqa: N801 - a context manager that uvicorn enters
    def __init__(self, *_: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


@pytest.fixture(name="until")
def _until() -> Callable[[Callable[[], object]], None]:
    return until


@pytest.fixture
def run_example(serve: Callable[..., Served], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run examples of docs/serve.md against one server: `run_example("chat.completions")` is the block of code that
    holds these words. A block sees the names of those that ran before it. What it prints is returned."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    url = serve(name="braid-tiny").url
    names: dict[str, Any] = {}

    def run(words: str) -> str:
        (code,) = (block for block in blocks if words in block)
        exec(compile(code.replace("http://127.0.0.1:8000", url), "serve.md", "exec"), names)
        return capsys.readouterr().out

    return run


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start a server: `serve(keys={...})` over a `FakeBraid`, `serve(braid)` over another one."""
    running: list[Served] = []

    def start(braid: Braid | None = None, **settings: Any) -> Served:
        served = Served(braid or FakeBraid(answering), Settings(**{"name": "fake", **settings}))
        running.append(served)
        return served

    yield start
    for each in running:
        each.close()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """A server with a system prompt and two documents."""
    found = serve()
    found.braid.register_system(RULES, name="rules")
    found.braid.register_many(list(DOCS.values()), names=list(DOCS), progress=False)
    return found


@pytest.fixture
def ask(served: Served) -> Callable[..., httpx.Response]:
    """Post a chat: a question, or messages."""

    def post(messages: str | list[dict[str, Any]], **body: Any) -> httpx.Response:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return served.http.post("/v1/chat/completions", json={"model": "fake", "messages": messages, **body})

    return post
