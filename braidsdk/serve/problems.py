"""Errors as clients see them: a status, and a shape.

OpenAI's                         {"error": {"message", "type", "param", "code"}}
Anthropic's, below /v1/messages  {"type": "error", "error": {"type", "message", "details": {"error_code"}}}
"""

from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from braidsdk import errors
from braidsdk.errors import BraidError
from braidsdk.serve.responses import Json

ANTHROPIC = "/v1/messages"
"""Where Anthropic's API begins."""

RETRY_S = 1
"""Seconds after which a client may come again when the queue is full or memory is short."""


class Problem(Exception):  # noqa: N818 - it is what the client did, not what failed here
    """Ends a request with a status."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {"Retry-After": str(RETRY_S)} if status in (429, 503) else {}

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_status(self) -> int:
        """The status that Anthropic's clients know it by."""
        return 529 if self.code == "kv_memory_full" else self.status

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """What Anthropic's clients read."""
        status = self.anthropic_status
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        error = {"type": kind, "message": str(self)}
        return {"type": "error", "error": error | ({"details": {"error_code": self.code}} if self.code else {})}

    def response(self, scope: Scope) -> Json:
        """The whole response, as clients of the route's API read it."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # if the application is mounted elsewhere
        if path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/"):
            return Json(self.anthropic_body, status_code=self.anthropic_status, headers=self.headers)
        return Json(self.body, status_code=self.status, headers=self.headers)


_TYPES: Mapping[int, str] = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

_ANTHROPIC_TYPES: Mapping[int, str] = {
    **_TYPES,
    403: "permission_error",
    413: "request_too_large",
    504: "timeout_error",
    529: "overloaded_error",
}

_STATUS: tuple[tuple[type[BraidError], int, str], ...] = (
    (errors.WindowExceededError, 400, "context_length_exceeded"),
    (errors.UnknownChunkError, 404, "chunk_not_found"),
    (errors.NameTakenError, 409, "name_taken"),
    (errors.InputError, 400, "invalid_value"),
    (errors.QueueFullError, 429, "queue_full"),
    (errors.PoolFullError, 503, "kv_memory_full"),
    (errors.DeadlineError, 504, "deadline_exceeded"),
    (errors.StoreFullError, 507, "store_full"),
    (errors.StoreReadOnlyError, 403, "store_read_only"),
    (errors.StoreError, 500, "store_error"),
    (errors.ClosedError, 503, "shutting_down"),
    (errors.EngineError, 503, "engine_failed"),
    (BraidError, 500, "internal_error"),
)
"""The first class that fits gives status and code."""


def problem_of(error: Exception) -> Problem:
    """What an error is to a client. One that is not ours is not shown: its text may hold anything."""
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return Problem(status, str(error), code=code)
    return Problem(500, "Something failed that was not expected; the server's log has it.", code="internal_error")
