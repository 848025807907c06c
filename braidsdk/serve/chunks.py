"""`/v1/chunks`, `/v1/explain`, `/tokenize`: what clients register, and what a call would find of it."""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from pydantic import Field

from braidsdk import Braid, Chunk
from braidsdk.serve.messages import MOST_CHUNKS, Strict
from braidsdk.serve.responses import Json
from braidsdk.serve.tenants import Tenants
from braidsdk.types import LEVEL_CONTEXT

Name = Annotated[str, Field(min_length=1)]


class NewChunk(Strict):
    """A text to register; see `Braid.register`."""

    text: str
    name: Name | None = None
    metadata: dict[str, Any] | None = None
    level: int = LEVEL_CONTEXT
    anchor: Name | None = None
    replace: bool = False


class ChangedChunk(Strict):
    """What of a chunk changes; see `Chunks.update`."""

    name: Name | None = None
    metadata: dict[str, Any] | None = None
    pinned: bool | None = None
    replace: bool = False


class Explained(Strict):
    """A composition to explain; see `Context.explain`."""

    chunks: Annotated[list[str], Field(max_length=MOST_CHUNKS)]
    mode: str | None = None


class Text(Strict):
    """A text to tokenize."""

    text: str


class Tokens(Strict):
    """Token ids of a text."""

    tokens: list[int]


class ChunkRoutes:
    """The routes."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self.router = APIRouter(tags=["chunks"])
        self.router.post("/v1/chunks", response_model=None, status_code=201)(self.create)
        self.router.get("/v1/chunks", response_model=None)(self.list)
        self.router.get("/v1/chunks/{chunk:path}", response_model=None)(self.get)
        self.router.patch("/v1/chunks/{chunk:path}", response_model=None)(self.update)
        self.router.delete("/v1/chunks/{chunk:path}", response_model=None)(self.delete)
        self.router.post("/v1/explain", response_model=None)(self.explain)
        self.router.post("/tokenize", response_model=None)(self.tokenize)
        self.router.post("/detokenize", response_model=None)(self.detokenize)

    def _braid(self, request: Request) -> Braid:
        return self._tenants[request.state.namespace]

    async def create(self, new: NewChunk, request: Request) -> Json:
        """Register a text. With an anchor its KV entry is computed and stored before this answers."""
        given = new.model_dump(exclude={"text"})
        register = partial(self._braid(request).register, new.text, **given)
        return await run_sync(lambda: Json(shown(register()), status_code=201))

    async def list(
        self,
        request: Request,
        name: str | None = None,
        level: int | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Json:
        """Chunks in the order of their registration, a page at a time, without their texts. `name` is a pattern."""
        chunks = self._braid(request).chunks

        def work() -> Json:
            page = chunks.list(name=name, level=level, after=after, limit=limit + 1)
            last_id = page[:limit][-1].id if page else None
            data = [shown(each) for each in page[:limit]]
            return Json({"object": "list", "data": data, "has_more": len(page) > limit, "last_id": last_id})

        return await run_sync(work)

    async def get(self, chunk: str, request: Request) -> Json:
        """A chunk with its text, by name or id."""
        get = self._braid(request).chunks.get
        return await run_sync(lambda: Json(shown(found := get(chunk)) | {"text": found.text}))

    async def update(self, chunk: str, changed: ChangedChunk, request: Request) -> Json:
        """Change a chunk's metadata, pin it, or give it one more name."""
        update = partial(self._braid(request).chunks.update, chunk, **changed.model_dump())
        return await run_sync(lambda: Json(shown(update())))

    async def delete(self, chunk: str, request: Request) -> Json:
        """Delete a chunk with its KV entries."""
        chunks = self._braid(request).chunks

        def work() -> str:
            found = chunks.get(chunk)
            chunks.delete(found)
            return found.id

        return Json({"id": await run_sync(work), "object": "chunk.deleted", "deleted": True})

    async def explain(self, asked: Explained, request: Request) -> Json:
        """What a call over these chunks would find, and why it would not find the rest."""
        braid = self._braid(request)
        found = await run_sync(lambda: braid.compose(asked.chunks, mode=asked.mode).explain())
        return Json(
            {
                "mode": found.mode,
                "notes": list(found.notes),
                "cached_tokens": found.cached_tokens,
                "missing_tokens": found.missing_tokens,
                "expected_ms": found.expected_ms,
                "chunks": [asdict(row) for row in found.chunks],
            }
        )

    async def tokenize(self, asked: Text, request: Request) -> Json:
        """The token ids of a text as a context chunk."""
        tokens = await run_sync(self._braid(request).tokenize, asked.text)
        return Json({"count": len(tokens), "tokens": tokens})

    async def detokenize(self, asked: Tokens, request: Request) -> Json:
        """The text of token ids."""
        return Json({"text": await run_sync(self._braid(request).detokenize, asked.tokens)})


def shown(chunk: Chunk) -> dict[str, Any]:
    """A chunk without its text. It tokenizes it: not for the event loop."""
    return {
        "id": chunk.id,
        "object": "chunk",
        "name": chunk.name,
        "level": chunk.level,
        "tokens": len(chunk.token_ids),
        "metadata": dict(chunk.metadata),
        "pinned": chunk.pinned,
    }
