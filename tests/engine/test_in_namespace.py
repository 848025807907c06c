"""One engine, several namespaces: `Braid.in_namespace`."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from braidsdk import Braid
from braidsdk.errors import ClosedError, InputError, UnknownChunkError
from braidsdk.testing import FakeBraid

RULES = "You answer questions from the documents."
TEXT = "The harbour opens at six."


def test_two_namespaces_share_a_model_and_see_nothing_of_each_other(random_braid: Braid) -> None:
    other = random_braid.in_namespace("other")
    asked = {}
    for braid in (random_braid, other):
        context = braid.compose([braid.register_system(RULES, name="rules"), braid.register(TEXT, name="doc")])
        assert not any(chunk.hit for chunk in context.explain().chunks[1:]), "the other's entry is no hit"
        asked[braid] = context.ask("When?", max_new_tokens=8)
        assert asked[braid].usage.computed_tokens >= len(context.input_ids) - len(braid.chunks.get("rules").token_ids)
    assert asked[random_braid].token_ids == asked[other].token_ids
    assert other._engine.model is random_braid._engine.model
    assert {each.namespace for each in other.chunks.list()} == {"other"}
    assert {each.id for each in other.chunks.list()}.isdisjoint(each.id for each in random_braid.chunks.list())
    other.chunks.delete("doc")
    assert random_braid.chunks.get("doc").text == TEXT
    with pytest.raises(UnknownChunkError):
        other.compose(["doc"])
    with pytest.raises(InputError, match="composed by another"):
        other.ask_many([(random_braid.compose(["doc"]), "When?")])


def test_hits_and_misses_are_counted_by_namespace(other: Callable[..., Braid]) -> None:
    with other() as braid:
        second = braid.in_namespace("second")
        context = braid.compose([braid.register_system(RULES), braid.register(TEXT)])
        context.ask("When?", max_new_tokens=1)
        assert (second.stats().hits, second.stats().misses) == (0, 0)
        second.compose([second.register(TEXT)]).ask("When?", max_new_tokens=1)
        assert (second.stats().hits, second.stats().misses) == (0, 2)
        assert (braid.stats().hits, braid.stats().misses) == (1, 1)
    with other(namespace="second") as braid:
        assert (braid.stats().all_hits, braid.stats().all_misses) == (0, 2)
    with other() as braid:
        assert (braid.stats().all_hits, braid.stats().all_misses) == (1, 1)


def test_what_one_namespace_tokenized_the_other_tokenizes_again(random_braid: Braid) -> None:
    other = random_braid.in_namespace("other")
    random_braid.register(TEXT)
    assert random_braid._engine.layout._encode._known.get(f"{TEXT}\n")
    assert other._engine.layout._encode._known.get(f"{TEXT}\n") is None
    assert other.count_tokens(TEXT) == random_braid.count_tokens(TEXT)


def test_a_conversation_goes_on_in_its_own_namespace(random_braid: Braid) -> None:
    other = random_braid.in_namespace("other")
    context = other.compose([other.register_system(RULES)])
    first = context.ask("When?", max_new_tokens=6)
    history = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": first.text}]
    second = context.ask("Why?", history=history, max_new_tokens=2)
    assert second.usage.cached_tokens > len(context.input_ids), "the turn was resident"


def test_the_engine_lives_as_long_as_one_of_them(tmp_path: Path) -> None:
    braid = FakeBraid()
    other = braid.in_namespace("other")
    thread = braid._engine._loop.thread
    del braid
    gc.collect()
    assert other.ask("Well?", chunks=[other.register(TEXT)], max_new_tokens=3).text
    other.close()
    thread.join(30)
    assert not thread.is_alive()


def test_closing_one_closes_all_of_them(random_braid: Braid) -> None:
    other = random_braid.in_namespace("other")
    other.close()
    for braid in (random_braid, other):
        with pytest.raises(ClosedError):
            braid.register(TEXT)
    with pytest.raises(ClosedError):
        random_braid.in_namespace("third")


@pytest.mark.parametrize("namespace", ["", "x" * 201, None, "\ud800"])
def test_a_namespace_that_can_not_be_used_is_refused(random_braid: Braid, namespace: str) -> None:
    with pytest.raises(InputError, match="namespace must be text"):
        random_braid.in_namespace(namespace)
