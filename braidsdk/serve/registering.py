"""`/v1/chunks:register`: many texts, and how far it is."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any, Literal

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from braidsdk import Braid, Progress
from braidsdk.serve.answering import unless_gone
from braidsdk.serve.chunks import Name, shown
from braidsdk.serve.messages import Strict
from braidsdk.serve.problems import problem_of
from braidsdk.serve.responses import Json, event
from braidsdk.serve.tenants import Tenants
from braidsdk.types import LEVEL_CONTEXT

AT_ONCE = 4
"""Registrations that run at once; more wait. They last long, and other requests need threads, too."""

Events = AsyncGenerator[dict[str, Any], None]


class OneOfMany(Strict):
    """One text of many."""

    text: str
    name: Name | None = None
    metadata: dict[str, Any] | None = None


class ManyChunks(Strict):
    """Texts to register; see `Braid.register_many`."""

    chunks: Annotated[list[OneOfMany], Field(min_length=1)]
    level: int = LEVEL_CONTEXT
    anchor: Name | None = None
    replace: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    stream: bool = False


class Registering:
    """The route."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._limiter = CapacityLimiter(AT_ONCE)
        self.router = APIRouter(tags=["chunks"])
        self.router.post("/v1/chunks:register", response_model=None)(self.register)

    async def register(self, many: ManyChunks, request: Request) -> Json | StreamingResponse:
        """Register texts. With `stream`, events tell how far it is. If the client goes away, it ends after the batch
        that is computed: what is stored stays, and the same request goes on from there."""
        told = _events(self._tenants[request.state.namespace], many, self._limiter)
        first = await unless_gone(request, anext(told))  # what is refused is refused before any status is sent
        if many.stream:
            return StreamingResponse(_stream(first, told), media_type="text/event-stream")
        return Json(await unless_gone(request, _last(first, told)))


class _GoneError(Exception):
    """Nobody waits for it any more."""


async def _events(braid: Braid, many: ManyChunks, limiter: CapacityLimiter) -> Events:
    """How far it is, and at last what is registered. To stop reading ends it."""
    loop, news, gone = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), threading.Event()

    def tell(progress: Progress) -> None:
        if gone.is_set():
            raise _GoneError
        loop.call_soon_threadsafe(news.put_nowait, {"object": "progress", **asdict(progress)})

    def work() -> dict[str, Any]:
        done = braid.register_many(
            [each.text for each in many.chunks],
            names=[each.name for each in many.chunks],
            metadata=[each.metadata for each in many.chunks],
            on_progress=tell,
            progress=False,
            **many.model_dump(include={"level", "anchor", "replace", "on_error"}),
        )
        skipped = [{"index": each.index, "name": each.name, "error": str(each.error)} for each in done.skipped]
        return {"object": "list", "data": [shown(each) for each in done], "skipped": skipped}

    def ended(working: "asyncio.Future[dict[str, Any]]") -> None:
        if not working.cancelled():
            working.exception()  # asyncio logs one that nobody has looked at, as when the client is gone
        news.put_nowait(None)

    working = asyncio.ensure_future(run_sync(work, limiter=limiter))
    working.add_done_callback(ended)
    try:
        while told := await news.get():
            yield told
        yield working.result()
    finally:
        gone.set()


async def _stream(first: dict[str, Any], told: Events) -> AsyncGenerator[str, None]:
    """Server-sent events."""
    async with aclosing(told):
        yield event(first)
        try:
            async for each in told:
                yield event(each)
        except Exception as error:  # the status is sent already
            yield event(problem_of(error).body)


async def _last(first: dict[str, Any], told: Events) -> dict[str, Any]:
    async with aclosing(told):
        last = first
        async for each in told:
            last = each
        return last
