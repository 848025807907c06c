"""The HTTP server: OpenAI's chat API, Anthropic's, and one for chunks, over one engine. Needs the extra `serve`.

    client -> Guard (keys, limits) -> a route -> Braid of the key's namespace -> the engine

`braid serve` starts it; `create_app` gives the ASGI application to mount elsewhere. Routes translate: they hold no
state, and call only what `Braid` shows to everybody.
"""

from braidsdk.serve.app import Settings, create_app

__all__ = ["Settings", "create_app"]
