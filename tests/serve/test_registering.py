"""`/v1/chunks:register`."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest


def many(count: int, **more: Any) -> dict[str, Any]:
    return {"chunks": [{"text": f"Text {n}. " * 60, "name": f"t{n}"} for n in range(count)], **more}


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]


def test_many_texts_are_registered(served: Any) -> None:
    body = many(5, anchor="rules")
    body["chunks"][2]["metadata"] = {"page": 2}
    found = served.http.post("/v1/chunks:register", json=body).json()
    assert (found["object"], found["skipped"]) == ("list", [])
    assert [each["name"] for each in found["data"]] == [f"t{n}" for n in range(5)]
    assert served.braid.chunks.get("t2").metadata == {"page": 2}
    assert served.http.post("/v1/chunks:register", json=body).json() == found, "it is all there"


def test_a_stream_tells_how_far_it_is(served: Any) -> None:
    with served.http.stream("POST", "/v1/chunks:register", json=many(20, anchor="rules", stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *progress, last = events_of(response)
    assert [each["object"] for each in progress] == ["progress"] * len(progress)
    done = [each["done_tokens"] for each in progress]
    assert (done[0], done[-1]) == (0, progress[0]["total_tokens"])
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert (last["object"], len(last["data"])) == ("list", 20)


def test_what_can_not_be_registered_is_refused_or_skipped(served: Any) -> None:
    body = many(3)
    body["chunks"][1]["text"] = "  "
    for stream in (True, False):
        refused = served.http.post("/v1/chunks:register", json={**body, "stream": stream})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert len(served.braid.chunks) == 3
    found = served.http.post("/v1/chunks:register", json={**body, "on_error": "skip"}).json()
    assert [each["name"] for each in found["data"]] == ["t0", "t2"]
    assert [(each["index"], each["name"]) for each in found["skipped"]] == [(1, "t1")]
    assert served.http.post("/v1/chunks:register", json={"chunks": []}).status_code == 400
    assert served.http.post("/v1/chunks:register", json=many(1, anchor="nobody")).status_code == 404


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_it_and_what_is_stored_stays(
    stream: bool, served: Any, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braidsdk.ingest.register.GROUP_TOKENS", {"cpu": 600})
    body = many(3_000, anchor="rules", stream=stream)
    with httpx.Client(base_url=served.url, timeout=30 if stream else 0.4) as http:
        if stream:
            with http.stream("POST", "/v1/chunks:register", json=body) as response:
                lines = (line for line in response.iter_lines() if line)
                assert [json.loads(next(lines)[6:])["done_chunks"] for _ in range(3)][-1] > 0
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chunks:register", json=body)
    until(lambda: not served.braid.stats().running + served.braid.stats().waiting)
    assert stream < served.braid.stats().entries < 3_000
