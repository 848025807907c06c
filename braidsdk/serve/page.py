"""`/`: a page for people, to look at chunks and to ask. One file without data, which uses the API beside it."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page. It needs no key: it asks for one if the API does."""
    return HTMLResponse(_PAGE, headers=HEADERS)


def _hash_of(page: str, tag: str) -> str:
    """The source expression that lets the one element of this tag run, and no other."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_PAGE = files("braidsdk.serve").joinpath("page.html").read_text(encoding="utf-8")

_POLICY = {
    "default-src": "'none'",
    "script-src": _hash_of(_PAGE, "script"),
    "style-src": _hash_of(_PAGE, "style"),
    "connect-src": "'self'",
    "img-src": "data:",  # the icon, which is empty, so that none is asked for
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # a text can't become markup
    "trusted-types": "'none'",
}

HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "Cache-Control": "no-cache",  # after an upgrade the old page must not stay
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Nothing but the page's own script and style runs, and it reaches its own server alone."""
