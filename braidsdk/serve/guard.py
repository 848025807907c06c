"""Stands before every route: who asks, how much they may send, and a line in the log of how it ended.

Bodies are read here, whole and within a bound, so that no route and no parser sees more.
"""

import asyncio
import hmac
import logging
from collections.abc import Callable, Mapping
from time import perf_counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from braidsdk.serve.problems import Problem

OPEN = ("/", "/health")
"""Paths that need no key. They hold no data."""

MAX_HEADER_BYTES = 16 * 2**10
"""Of all headers of a request together."""

BODY_S = 60.0
"""Seconds in which a body must have come. A client that stops in the middle would hold up the server's end."""

_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware. It puts the caller's namespace into `scope["state"]`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Mapping[str, str],
        namespace: str,
        max_body_bytes: int,
        hosts: tuple[str, ...],
        on_refused: Callable[[int], None],
    ) -> None:
        """Guard an application.

        Args:
            app: what comes behind.
            keys: the namespace of each API key. Without any, everybody may ask.
            namespace: of who needs no key.
            max_body_bytes: of a request's body.
            hosts: names by which the server may be asked; without any, all.
            on_refused: is told the status of what is refused here.
        """
        self._app, self._namespace, self._max_body_bytes = app, namespace, max_body_bytes
        self._hosts, self._on_refused = hosts, on_refused
        self._keys = [(key.encode(), of) for key, of in keys.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused; hand on the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._handle(scope, receive, sent)
        finally:  # without the path and the query, which may hold names
            route = getattr(scope.get("route"), "path", "-")
            _log.info("%s %s %d %.1f ms", scope["method"], route, status, (perf_counter() - started) * 1e3)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            size = sum(len(name) + len(value) for name, value in headers.raw)
            if size > MAX_HEADER_BYTES:
                message = f"The headers must have at most {MAX_HEADER_BYTES:,} bytes; got {size:,}."
                raise Problem(431, message, code="headers_too_large")
            self._check_host(headers)
            namespace = self._namespace_of(headers, scope["path"])
            try:
                async with asyncio.timeout(BODY_S):
                    body = await self._body(headers, receive)
            except TimeoutError:
                raise Problem(408, f"The body must come within {BODY_S:.0f} s; it did not.", code="timeout") from None
        except Problem as problem:
            response = problem.response(scope)
            self._on_refused(response.status_code)
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["namespace"] = namespace
        read = False

        async def again() -> Message:
            nonlocal read
            if read:
                return await receive()  # that the client went away
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)

    def _check_host(self, headers: Headers) -> None:
        """Refuse another name of this machine: a page elsewhere may have its own name point here, and would be let in
        by the browser."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._hosts and name.lower() not in self._hosts:
            message = f"Host must be {' or '.join(self._hosts)}; got another. A server with --api-key takes any."
            raise Problem(403, message, code="unknown_host")

    def _namespace_of(self, headers: Headers, path: str) -> str:
        if not self._keys or path in OPEN:
            return self._namespace
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = (token if scheme.lower() == "bearer" else headers.get("x-api-key", "")).strip().encode()
        found = None
        for key, namespace in self._keys:  # all of them, so that time tells nothing
            if hmac.compare_digest(key, given):
                found = namespace
        if found is None:
            got = "this one is not known" if given else "got none"
            ways = "'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            message = f"An API key must come as {ways}; {got}. Ask who runs this server for one."
            raise Problem(401, message, code="invalid_api_key")
        return found

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(499, "The client went away.", code="client_closed_request")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> Problem:
        limit = f"{self._max_body_bytes:,}"
        message = f"The body must have at most {limit} bytes; got more. Send less, or start the server with more."
        return Problem(413, message, code="body_too_large")
