"""Texts that are composed and not registered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk import Braid, Inline
from braidsdk.errors import EmptyTextError, InputError, WindowExceededError
from braidsdk.types import LEVEL_SYSTEM

RULES = "You answer questions from the documents."
DOCS = ["The capital of Aistonia is Flubarg.", "Its harbour opens at six."]


def files_of(braid: Braid, folder: Path) -> list[Path]:
    braid.close()  # all writes are done
    return [each for each in folder.rglob("*") if each.is_file()]


def test_an_answer_over_inline_texts_is_that_over_registered_ones(random_braid: Braid) -> None:
    chunks = [random_braid.register_system(RULES), *map(random_braid.register, DOCS)]
    for mode in ("anchored", "exact", "isolated", "linked(4)"):
        want = random_braid.ask("When?", chunks=chunks, mode=mode, max_new_tokens=12)
        other = random_braid.in_namespace(mode)
        inline = [Inline(RULES, LEVEL_SYSTEM), *map(Inline, DOCS)]
        got = other.ask("When?", chunks=inline, mode=mode, max_new_tokens=12)
        assert (got.prompt_ids, got.token_ids) == (want.prompt_ids, want.token_ids)


def test_nothing_of_an_inline_text_is_stored_and_it_stays_in_memory(random_braid: Braid, tmp_path: Path) -> None:
    doc = random_braid.register(DOCS[0])
    context = random_braid.compose([Inline(RULES, LEVEL_SYSTEM), doc, Inline(DOCS[1])])
    first = context.ask("When?", max_new_tokens=2)
    assert first.usage.computed_tokens >= len(context.input_ids)
    explained = context.explain()
    assert [(row.label, row.chunk_id, row.where) for row in explained.chunks] == [
        ("(inline)", None, "memory"),
        (doc.label, doc.id, "memory"),
        ("(inline)", None, "memory"),
    ]
    second = context.ask("Why?", max_new_tokens=2)
    assert second.usage.cached_tokens == len(context.input_ids)
    assert random_braid.stats().entries == 0, "not even that of the document, which was computed after the text"
    assert len(random_braid.chunks) == 1
    content = b"".join(each.read_bytes() for each in files_of(random_braid, tmp_path / "store"))
    assert DOCS[0].encode() in content
    assert RULES.encode() not in content
    assert DOCS[1].encode() not in content


def test_a_text_that_is_registered_is_its_chunk(random_braid: Braid) -> None:
    rules = random_braid.register_system(RULES, name="rules")
    doc = random_braid.register(DOCS[0], anchor=rules)
    context = random_braid.compose([Inline(f"  {RULES}\n", LEVEL_SYSTEM), Inline(DOCS[0]), Inline(RULES)])
    explained = context.explain().chunks
    assert [row.chunk_id for row in explained] == [rules.id, doc.id, None], "a level is part of what a chunk is"
    assert [row.hit for row in explained] == [True, True, False]


def test_sources_tell_inline_texts_apart_and_can_be_composed_again(random_braid: Braid) -> None:
    context = random_braid.compose([random_braid.register_system(RULES), *map(Inline, DOCS)])
    answer = context.ask("When?", max_new_tokens=3, sources=True)
    assert answer.sources is not None
    assert sorted(source.chunk.text for source in answer.sources) == sorted(DOCS)
    again = random_braid.compose([source.chunk for source in answer.sources])
    assert [row.chunk_id for row in again.explain().chunks] == [None, None, None]


@pytest.mark.parametrize(
    ("text", "level", "error"),
    [
        ("  ", 1, EmptyTextError),
        (7, 1, InputError),
        ("a", 2, InputError),
        ("a", True, InputError),
        ("a" * 10_000_000, 1, WindowExceededError),
    ],
)
def test_an_inline_text_that_can_not_be_used_is_refused(
    text: Any, level: int, error: type[Exception], random_braid: Braid
) -> None:
    with pytest.raises(error):
        random_braid.compose([Inline(text, level)])


@pytest.mark.parametrize(
    "use",
    [
        lambda braid, text: braid.compose([text], keep=True),
        lambda braid, text: braid.chunks.delete(text),
        lambda braid, text: braid.chunks.update(text, name="x"),
        lambda braid, text: braid.chunks.list(after=text),
        lambda braid, text: braid.register("A text.", anchor=text),
        lambda braid, text: braid.fidelity([text], ["Why?"]),
    ],
)
def test_what_needs_a_registered_chunk_refuses_an_inline_text(
    use: Callable[[Braid, object], object], random_braid: Braid
) -> None:
    text = Inline(RULES, LEVEL_SYSTEM)
    with pytest.raises(InputError, match="registered"):
        use(random_braid, text)
    context = random_braid.compose([random_braid.register_system("Else."), Inline(DOCS[0])])
    answer = context.ask("When?", max_new_tokens=1, sources=True)
    assert answer.sources
    with pytest.raises(InputError, match="registered"):
        use(random_braid, answer.sources[0].chunk)
