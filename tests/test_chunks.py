"""`braid.chunks`: lists by page and filter, counts, changes, deletions of one and of many."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from braidsdk import Braid, chunks
from braidsdk.errors import InputError, NameTakenError, UnknownChunkError
from braidsdk.store.index import Index
from braidsdk.testing import FakeBraid


@pytest.fixture
def fake() -> Iterator[FakeBraid]:
    with FakeBraid() as braid:
        braid.register_system("Answer.", name="rules")
        braid.register_many(
            [f"Page {n}." for n in range(7)],
            names=[f"guide/{n}" for n in range(7)],
            metadata=[{"odd": bool(n % 2), "page": n} for n in range(7)],
            progress=False,
        )
        yield braid


def names(found: list[Any]) -> list[str]:
    return [chunk.name for chunk in found]


def test_lists_are_filtered_and_paged(fake: FakeBraid) -> None:
    assert names(fake.chunks.list(name="guide/[0-2]")) == ["guide/0", "guide/1", "guide/2"]
    assert names(fake.chunks.list(level=0)) == ["rules"]
    assert names(fake.chunks.list(metadata={"odd": True}, limit=2)) == ["guide/1", "guide/3"]
    page, seen = fake.chunks.list(name="guide*", limit=3), []
    while page:
        seen += names(page)
        page = fake.chunks.list(name="guide*", limit=3, after=page[-1])
    assert seen == [f"guide/{n}" for n in range(7)]
    assert names(fake.chunks.list(after="guide/5")) == ["guide/6"]


def test_counts_and_length(fake: FakeBraid) -> None:
    assert len(fake.chunks) == fake.chunks.count() == 8
    assert fake.chunks.count(name="guide*", metadata={"odd": False}) == 4
    with FakeBraid() as empty:
        assert len(empty.chunks) == 0
        assert empty.chunks, "it is there, empty or not"


def test_iterating_gives_all_by_pages(fake: FakeBraid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PAGE", 3)
    assert list(fake.chunks) == fake.chunks.list()
    for chunk in fake.chunks:  # each page's last chunk may be deleted while it is walked
        if chunk.name == "guide/0":
            fake.chunks.delete("guide/0")
    assert len(fake.chunks) == 7


def test_a_chunk_gets_other_metadata_and_names(fake: FakeBraid) -> None:
    before = fake.chunks.get("guide/1")
    changed = fake.chunks.update("guide/1", metadata={"v": 2}, name="first")
    assert changed == before
    assert (changed.name, changed.metadata) == ("first", {"v": 2})
    assert fake.chunks.get("guide/1").metadata == {"v": 2}
    assert fake.chunks.update(before).metadata == {"v": 2}, "what is not given stays"
    with pytest.raises(NameTakenError):
        fake.chunks.update(before, name="guide/2")
    assert fake.chunks.update(before, name="guide/2", replace=True).name == "guide/2"
    with pytest.raises(UnknownChunkError, match=r"Did you mean 'guide/1'"):
        fake.chunks.update("guide/11", metadata={})
    with pytest.raises(InputError, match="JSON"):
        fake.chunks.update(before, metadata={"x": object()})


def test_names_ids_chunks_and_documents_are_resolved_in_one_transaction(
    fake: FakeBraid, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["guide/3", "rules", "guide/1"]
    known = [fake.chunks.get(name) for name in names]
    fake.chunks.update("guide/1", name="alias")
    document = SimpleNamespace(page_content="Page 5.", metadata={})
    begun: list[object] = []
    transaction = Index._transaction
    monkeypatch.setattr(Index, "_transaction", lambda self, begin: begun.append(begin) or transaction(self, begin))
    given = [*names, known[0], known[2].id, "alias", document, *names]
    found = fake.chunks.resolve(given)
    assert len(begun) == 1
    assert [chunk.name for chunk in found] == [*names, "guide/3", "guide/1", "alias", "guide/5", *names]
    assert found[:3] == tuple(known)


def test_many_are_deleted_at_once_or_none(random_braid: Braid) -> None:
    rules = random_braid.register_system("Answer.")
    made = random_braid.register_many(["a.", "b.", "c.", "d."], anchor=rules, names=list("abcd"), progress=False)

    def resident() -> list[bool]:
        again = [rules, *random_braid.register_many(["a.", "b.", "c.", "d."], progress=False)]
        return [row.hit for row in random_braid.compose(again, mode="exact").explain().chunks]

    random_braid.compose([rules, *made], mode="exact").prepare()
    assert resident() == [True] * 5
    with pytest.raises(UnknownChunkError):
        random_braid.chunks.delete_many(["a", "nobody"])
    assert random_braid.chunks.count() == 5
    assert random_braid.chunks.delete_many(random_braid.chunks.list(name="[ab]")) == 2
    assert random_braid.chunks.list() == [rules, *made[2:]]
    assert resident() == [True] + [False] * 4, "what was computed after one that is gone, is gone too"
    assert random_braid.chunks.delete_many([]) == 0
    with pytest.raises(InputError, match="must be a list"):
        random_braid.chunks.delete_many("c")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": 5}, "name must be a pattern"),
        ({"metadata": "x"}, "metadata must be a mapping"),
        ({"metadata": {"x": [1]}}, "Compare lists and objects"),
        ({"level": 2}, "level must be 0"),
        ({"limit": -1}, "limit must be"),
        ({"limit": True}, "limit must be"),
        ({"after": "nobody"}, "No chunk 'nobody'"),
    ],
    ids=str,
)
def test_what_a_list_refuses(fake: FakeBraid, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fake.chunks.list(**arguments)
