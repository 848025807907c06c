"""Callers of a chat server, in a process of their own: reads what to ask on stdin, prints what they saw as JSON.

They read server-sent events with asyncio's streams alone, so that they take little of the machine. Used by
`serving_http.py`.
"""

import asyncio
import json
import sys
from itertools import cycle
from time import perf_counter
from typing import Any


class Caller:
    """One connection, kept open."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._host, self._port, self._path = host, port, path
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, body: bytes) -> dict[str, Any]:
        """Post a request, and read its answer to the end."""
        started, pieces = perf_counter(), []
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        head = f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = (await self._reader.readline()).split()[1]
        while (await self._reader.readline()).strip():
            pass
        if status != b"200":
            self._writer.close()
            self._writer = None
            return {"started": started, "pieces": [], "ended": perf_counter(), "error": status.decode()}
        done = False
        while size := int(await self._reader.readline(), 16):
            part = await self._reader.readexactly(size + 2)
            now = perf_counter()
            pieces += [now] * (part.count(b'"content":"') - part.count(b'"content":""'))
            done = done or b"data: [DONE]" in part
        await self._reader.readline()
        error = None if done else "cut"
        return {"started": started, "pieces": pieces, "ended": perf_counter(), "error": error}


async def closed(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Each caller asks again as soon as it has its answer, for so many seconds; once at least."""
    bodies, seen = cycle([json.dumps(each).encode() for each in asked["bodies"]]), []
    deadline = perf_counter() + asked["seconds"]

    async def caller() -> None:
        connection = Caller(asked["host"], asked["port"], asked["path"])
        while True:
            seen.append(await connection.ask(next(bodies)))
            if perf_counter() >= deadline:
                return

    await asyncio.gather(*(caller() for _ in range(asked["callers"])))
    return seen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(closed(json.load(sys.stdin)))))
