"""The ASGI application: routes, errors, and what operators ask."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from braidsdk import Braid, __version__
from braidsdk.errors import BraidError, InputError, shown
from braidsdk.serve.answering import Answering
from braidsdk.serve.anthropic import Messages
from braidsdk.serve.chat import Chat
from braidsdk.serve.chunks import ChunkRoutes
from braidsdk.serve.guard import Guard
from braidsdk.serve.metrics import Metrics
from braidsdk.serve.openai_responses import Responses
from braidsdk.serve.page import router as page
from braidsdk.serve.problems import Problem, problem_of
from braidsdk.serve.registering import Registering
from braidsdk.serve.responses import Json
from braidsdk.serve.tenants import SALTED, Tenants

_log = logging.getLogger(__name__)

MOST_CHARACTERS = 128
"""Of a namespace; a salt comes behind it."""


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine to itself."""


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        name: what clients call the model.
        namespace: the namespace of callers without a key.
        keys: the namespace of each API key. Without any, everybody who reaches the server may ask.
        max_body_bytes: the most bytes of a request's body.
        default_tokens: the most tokens of an answer for which a client names no limit.
        hosts: names in `Host` by which it may be asked, such as `LOOPBACK`; without any, all.
    """

    name: str = "braid-tiny"
    namespace: str = "default"
    keys: Mapping[str, str] = field(default_factory=dict)
    max_body_bytes: int = 8 * 2**20
    default_tokens: int = 1024
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            InputError: one can't be used. No key is shown.
        """
        if any(not key or key != key.strip() or not key.isascii() for key in self.keys):
            raise InputError(
                "API keys must be ASCII text without blanks around it; got an empty one, or one with other characters."
            )
        for each in (self.namespace, *self.keys.values()):
            if not 1 <= len(each) <= MOST_CHARACTERS or SALTED in each:
                raise InputError(
                    f"Namespaces of a server must have 1 to {MOST_CHARACTERS} characters, and no U+001F; got "
                    f"{shown(each)}. Choose another."
                )


def create_app(braid: Braid, settings: Settings | None = None) -> FastAPI:
    """The server over an open Braid, which is closed when the server stops.

    Args:
        braid: model, store and engine.
        settings: see `Settings`.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        braid.close()

    metrics = Metrics(braid)
    tenants = Tenants(braid)
    app = FastAPI(
        title="BraidSDK",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    answering = Answering(tenants, metrics, model=settings.name, default_tokens=settings.default_tokens)
    app.include_router(Chat(answering).router)
    app.include_router(Responses(answering).router)
    app.include_router(Messages(answering).router)
    app.include_router(ChunkRoutes(tenants).router)
    app.include_router(Registering(tenants).router)
    app.include_router(page)

    @app.get("/health", tags=["operations"])
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operations"])
    async def ready() -> dict[str, str]:
        """Whether model and store can be used: 503 if not."""
        await run_sync(braid.stats)  # it reads the store
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"])
    async def shown_metrics() -> Response:
        """Counts, in Prometheus's text format."""
        return PlainTextResponse(await run_sync(metrics.text), media_type=CONTENT_TYPE_LATEST)

    def answer(request: Request, problem: Problem) -> Json:
        response = problem.response(request.scope)
        metrics.refused(response.status_code)
        return response

    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Json:
        return answer(request, problem)

    @app.exception_handler(BraidError)
    async def on_error(request: Request, error: BraidError) -> Json:
        return answer(request, problem_of(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Json:
        return answer(request, _invalid(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Json:
        return answer(request, Problem(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Json:
        _log.exception("a request failed", exc_info=error)
        return answer(request, problem_of(error))

    app.add_middleware(
        Guard,
        keys=settings.keys,
        namespace=settings.namespace,
        max_body_bytes=settings.max_body_bytes,
        hosts=settings.hosts,
        on_refused=metrics.refused,
    )
    return app


def _invalid(error: RequestValidationError) -> Problem:
    """What is wrong with a body, without what it holds."""
    first = error.errors()[0]
    where = ".".join(str(each) for each in first["loc"][1:]) or "body"
    kind = "unsupported_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    message = f"{where[:200]}: {first['msg'][:400]}."
    if first["type"] == "extra_forbidden":
        message = f"{where[:200]} is not supported by this server. Leave it out."
    return Problem(400, message, code=kind, param=where[:200])
