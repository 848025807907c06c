"""Runs the application on a port, until a signal ends it."""

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from braidsdk.errors import InputError

DRAIN_S = 300
"""Seconds that running answers have to end after the first signal."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: an address or a name of this machine.
        port: 0 takes a free one.

    Raises:
        InputError: it can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named, asyncio sends each piece of an answer at once. Else it may wait for 40 ms.
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise InputError(
            f"host and port must be an address to listen on; got {host}:{port} ({error.strerror}). Choose another port."
        ) from error
    return listening


def run(app: FastAPI, host: str, port: int, on_listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Running answers then end first; a second signal ends them.

    Args:
        app: what `create_app` made.
        host, port: see `bind`.
        on_listening: is called with the server's address.

    Raises:
        InputError: see `bind`.
    """
    listening = bind(host, port)
    name, taken = listening.getsockname()[:2]
    on_listening(f"http://{f'[{name}]' if ':' in name else name}:{taken}")
    Server(config(app)).run(sockets=[listening])


def config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs it: with h11, which bounds what it holds of a request's head, and without a log of its own."""
    return uvicorn.Config(
        app,
        http="h11",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )


class Server(uvicorn.Server):
    """Ends at once at the second signal, whichever it is, and does not raise signals again once it has ended."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - its base's arguments
        self.force_exit = self.should_exit
        self.should_exit = True
