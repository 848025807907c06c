"""`/v1/chunks`, `/v1/explain`, `/tokenize`."""

import json
from typing import Any

import pytest

RULES = "You answer questions from the documents."


def test_a_chunk_is_registered_read_changed_and_deleted(served: Any) -> None:
    http = served.http
    made = http.post(
        "/v1/chunks", json={"text": " A text.\n", "name": "a/b c", "metadata": {"n": 1}, "anchor": "rules"}
    )
    assert made.status_code == 201
    chunk = made.json()
    assert (chunk["name"], chunk["metadata"], chunk["level"], chunk["pinned"]) == ("a/b c", {"n": 1}, 1, False)
    assert "text" not in chunk
    for way in (chunk["id"], "a/b c", "a%2Fb%20c"):
        found = http.get(f"/v1/chunks/{way}").json()
        assert (found["id"], found["text"]) == (chunk["id"], "A text.")
    changed = http.patch("/v1/chunks/a/b c", json={"metadata": {"n": 2}, "pinned": True}).json()
    assert (changed["metadata"], changed["pinned"]) == ({"n": 2}, True)
    assert served.braid.chunks.get(chunk["id"]).pinned
    assert http.delete("/v1/chunks/a/b c").json() == {"id": chunk["id"], "object": "chunk.deleted", "deleted": True}
    gone = http.get(f"/v1/chunks/{chunk['id']}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "chunk_not_found")


def test_chunks_are_listed_a_page_at_a_time(served: Any) -> None:
    served.braid.register_many([f"Text {n}." for n in range(7)], names=[f"t{n}" for n in range(7)], progress=False)
    seen, after = [], None
    while True:
        query = {"limit": 3, "name": "t*"} | ({"after": after} if after else {})
        page = served.http.get("/v1/chunks", params=query).json()
        seen += [each["name"] for each in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == [f"t{n}" for n in range(7)]
    assert [each["name"] for each in served.http.get("/v1/chunks?level=0").json()["data"]] == ["rules"]
    assert served.http.get("/v1/chunks?name=zz").json() == {
        "object": "list",
        "data": [],
        "has_more": False,
        "last_id": None,
    }


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_value"),
        ({"text": "  "}, 400, "invalid_value"),
        ({"text": "x", "level": 7}, 400, "invalid_value"),
        ({"text": "x", "anchor": "nobody"}, 404, "chunk_not_found"),
        ({"text": "Other.", "name": "rules"}, 409, "name_taken"),
        ({"text": "word " * 100_000}, 400, "context_length_exceeded"),
        ({"text": "x", "more": 1}, 400, "unsupported_parameter"),
    ],
)
def test_a_chunk_that_can_not_be_registered_is_refused(body: Any, status: int, code: str, served: Any) -> None:
    found = served.http.post("/v1/chunks", json=body)
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert len(served.braid.chunks) == 3


def test_any_metadata_of_json_can_be_shown(served: Any) -> None:
    metadata = {"_sa_x": 1, "path": "caf\udce9.txt", "deep": [[[{"\u00e9": None}]]]}  # a file's name that is not UTF-8
    content = json.dumps({"text": "x", "name": "x", "metadata": metadata})
    made = served.http.post("/v1/chunks", content=content, headers={"Content-Type": "application/json"})
    assert made.status_code == 201
    assert json.loads(served.http.get("/v1/chunks/x").content)["metadata"] == metadata


def test_a_composition_is_explained(served: Any) -> None:
    found = served.http.post("/v1/explain", json={"chunks": ["rules", "belmora"]}).json()
    assert (found["mode"], found["chunks"][0]["where"]) == ("anchored", "memory")
    assert [row["hit"] for row in found["chunks"]] == [True, False]
    assert found["missing_tokens"] == found["chunks"][1]["tokens"]
    assert served.http.post("/v1/explain", json={"chunks": ["nobody"]}).status_code == 404
    assert served.http.post("/v1/explain", json={"chunks": ["rules"], "mode": "best"}).status_code == 400


def test_a_text_is_tokenized_and_back(served: Any) -> None:
    found = served.http.post("/tokenize", json={"text": " four "}).json()
    assert found == {"count": 5, "tokens": [*b"four\n"]}
    assert served.http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"text": "four\n"}
    assert served.http.post("/tokenize", json={"text": " "}).status_code == 400
    for tokens in ([-1], [10**6], ["a"], "abc"):
        assert served.http.post("/detokenize", json={"tokens": tokens}).status_code == 400
