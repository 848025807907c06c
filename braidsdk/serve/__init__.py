"""The HTTP server: OpenAI's and Anthropic's APIs, one for chunks, and a page, over one engine. Needs the extra `serve`.

    client -> Guard (keys, limits) -> a route -> Braid of the key's namespace -> the engine

`braid serve` and `run` start it; `create_app` gives the ASGI application to mount elsewhere. Routes translate. They
hold no state, and call only what `Braid` shows to everybody.
"""

from braidsdk.serve.app import LOOPBACK, Settings, create_app
from braidsdk.serve.run import run

__all__ = ["LOOPBACK", "Settings", "create_app", "run"]
