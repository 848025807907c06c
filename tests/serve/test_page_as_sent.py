"""The page at `/`, as it is sent."""

import base64
import hashlib
import re
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any


def test_the_page_runs_its_own_script_and_style_and_nothing_else(served: Any) -> None:
    found = served.http.get("/")
    assert (found.status_code, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(each.split(" ", 1) for each in found.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", found.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["referrer-policy"] == "no-referrer"
    assert "unsafe" not in str(policy)


def test_the_page_is_small_and_names_no_other_host(served: Any) -> None:
    page = served.http.get("/").text
    assert len(page.encode()) < 26_000
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://www.w3.org"}, "the name of SVG, which nobody fetches"
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\sstyle=|\son\w+=", page)


def test_the_page_needs_no_key_and_holds_no_data(serve: Callable[..., Any]) -> None:
    served = serve(keys={"key-1": "default"})
    served.braid.register("A secret.", name="secret")
    found = served.http.get("/")
    assert found.status_code == 200
    assert "secret" not in found.text.lower()
    assert served.http.get("/v1/chunks").status_code == 401


def test_the_page_is_in_the_package() -> None:
    assert files("braidsdk.serve").joinpath("page.html").is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "page.html" in project["tool"]["setuptools"]["package-data"]["braidsdk.serve"]
