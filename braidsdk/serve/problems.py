"""Errors as clients see them: a status, and OpenAI's shape `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

from braidsdk import errors
from braidsdk.errors import BraidError
from braidsdk.serve.responses import Json

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

    def response(self) -> Json:
        """The whole response."""
        return Json(self.body, status_code=self.status, headers=self.headers)


_TYPES: Mapping[int, str] = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

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
