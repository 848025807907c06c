"""Bodies that are sent: JSON in ASCII, so that whatever was registered can be shown."""

import json
from typing import Any

from starlette.responses import JSONResponse


class Json(JSONResponse):
    """JSON whose other characters are escaped: a file's name may hold half a surrogate pair, which UTF-8 can't."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return text_of(content).encode("ascii")


def event(data: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event, with a name if the API gives it one."""
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {text_of(data)}\n\n"


def text_of(content: Any) -> str:
    """Content as JSON in ASCII."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
