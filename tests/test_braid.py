"""What an application sees: registering, composing, asking, explaining, deleting."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from braidsdk import Braid, Stream
from braidsdk.cache.pool import Pool
from braidsdk.engine.batch import forward
from braidsdk.errors import BraidError, ClosedError, NameTakenError, UnknownChunkError
from braidsdk.store import ChunkStore

SYSTEM = "You answer questions from the documents."
TEXTS = ["The first document.", "The second document, a bit longer.", "The third."]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of each pass that computes missing entries."""
    seen: list[int] = []

    def counting(model, pool, runs, wanted):  # type: ignore[no-untyped-def]
        if missing := [run for run, is_tail in zip(runs, wanted, strict=True) if not is_tail]:
            seen.append(sum(len(run.token_ids) for run in missing))
        return forward(model, pool, runs, wanted)

    monkeypatch.setattr("braidsdk.engine.runner.forward", counting)
    return seen


def test_the_same_text_is_the_same_chunk_and_computes_nothing(random_braid: Braid, computed: list[int]) -> None:
    rules = random_braid.register_system(SYSTEM)
    first = random_braid.register(TEXTS[0], anchor=rules)
    assert computed == [len(rules.token_ids), len(first.token_ids)]
    assert random_braid.register(f"  {TEXTS[0]}\n", anchor=rules, name="one") == first
    assert random_braid.register_system(SYSTEM) == rules
    assert len(computed) == 2


def test_an_ingestion_script_runs_twice_and_an_edited_document_computes_one(
    random_braid: Braid, computed: list[int]
) -> None:
    rules, names = random_braid.register_system(SYSTEM), ["a", "b", "c"]

    def ingest(texts: list[str]) -> list[str]:
        return [chunk.id for chunk in random_braid.register_many(texts, names=names, anchor=rules, replace=True)]

    ids = ingest(TEXTS)
    before = list(computed)
    assert ingest(TEXTS) == ids
    assert computed == before
    edited = ingest([TEXTS[0], "Edited.", TEXTS[2]])
    assert computed[len(before) :] == [len(random_braid.chunks.get("b").token_ids)]
    assert (edited[0], edited[2]) == (ids[0], ids[2])
    assert random_braid.chunks.get(ids[1]).text == TEXTS[1], "the old id stays valid"
    assert random_braid.chunks.get("b").id == edited[1]


def test_a_name_stands_for_one_text(random_braid: Braid) -> None:
    first = random_braid.register(TEXTS[0], name="a")
    assert random_braid.register(TEXTS[0], name="a") == first
    assert random_braid.register(TEXTS[0], name="alias") == first
    with pytest.raises(NameTakenError, match="replace"):
        random_braid.register(TEXTS[1], name="a")
    assert random_braid.chunks.get("a") == first
    assert random_braid.chunks.get("alias").id == first.id
    assert len(random_braid.chunks.list()) == 1


def test_a_name_taken_in_the_middle_of_many_registers_none(random_braid: Braid) -> None:
    random_braid.register(TEXTS[0], name="b")
    with pytest.raises(NameTakenError):
        random_braid.register_many(TEXTS, names=["x", "b", "z"])
    assert [chunk.text for chunk in random_braid.chunks.list()] == [TEXTS[0]]


def test_metadata_is_kept_and_replaced_only_when_given(random_braid: Braid) -> None:
    random_braid.register(TEXTS[0], name="a", metadata={"source": "x.md", "pages": [1, 2]})
    random_braid.register(TEXTS[0], name="a")
    assert random_braid.chunks.get("a").metadata == {"source": "x.md", "pages": [1, 2]}
    random_braid.register(TEXTS[0], metadata={})
    assert random_braid.chunks.get("a").metadata == {}


def test_registering_without_an_anchor_waits_for_the_first_question(random_braid: Braid, computed: list[int]) -> None:
    rules = random_braid.register_system(SYSTEM)
    document = random_braid.register(TEXTS[0])
    assert computed == [len(rules.token_ids)]
    answer = random_braid.ask("Well?", chunks=[rules, document], max_new_tokens=2)
    assert computed[1:] == [len(document.token_ids)]
    assert answer.usage.cached_tokens == len(rules.token_ids)


def test_compose_runs_no_model_and_ask_computes_only_what_is_missing(random_braid: Braid, computed: list[int]) -> None:
    rules = random_braid.register_system(SYSTEM)
    documents = random_braid.register_many(TEXTS)
    del computed[:]
    context = random_braid.compose([rules, *documents])
    assert computed == []
    explained = context.explain()
    assert [row.hit for row in explained.chunks] == [True, False, False, False]
    answer = context.ask("Well?", max_new_tokens=3)
    question = len(answer.prompt_ids) - len(context.input_ids)
    missing = sum(len(document.token_ids) for document in documents)
    assert answer.usage.computed_tokens == missing + question
    assert answer.usage.prompt_tokens == answer.usage.cached_tokens + answer.usage.computed_tokens
    again = context.ask("Well?", max_new_tokens=3)
    assert again.usage.computed_tokens == question
    assert (again.text, again.token_ids) == (answer.text, answer.token_ids)
    assert again.timings.first_token_ms > 0
    assert again.timings.decode_tokens_per_s is not None


def test_one_resident_copy_serves_every_order_and_position(random_braid: Braid, computed: list[int]) -> None:
    rules = random_braid.register_system(SYSTEM)
    a, b, c = random_braid.register_many(TEXTS, anchor=rules)
    del computed[:]
    for order in ([rules, a, b, c], [rules, c, a], [rules, b, b, a]):
        usage = random_braid.ask("Well?", chunks=order, max_new_tokens=1).usage
        assert usage.cached_tokens == sum(len(chunk.token_ids) for chunk in order)
    assert computed == []


def test_a_stream_gives_the_answer_in_pieces(random_braid: Braid) -> None:
    context = random_braid.compose([random_braid.register(TEXTS[0])])
    whole = context.ask("Well?", max_new_tokens=20)
    stream = context.stream("Well?", max_new_tokens=20)
    assert isinstance(stream, Stream)
    with pytest.raises(BraidError, match="not complete"):
        _ = stream.answer
    with pytest.raises(BraidError, match="not known yet"):
        _ = stream.usage
    pieces = [next(stream)]
    known = stream.usage
    pieces += stream
    assert len(pieces) > 1
    assert replace(known, completion_tokens=20) == stream.usage == stream.answer.usage
    assert "".join(pieces) == whole.text == stream.answer.text
    assert stream.answer.token_ids == whole.token_ids


def test_a_stream_closed_early_frees_its_pages(random_braid: Braid, pool_of: Callable[[Braid], Pool]) -> None:
    context = random_braid.compose([random_braid.register(TEXTS[0])])
    context.ask("Well?", max_new_tokens=20)
    used = pool_of(random_braid).used_bytes
    with context.stream("Well?", max_new_tokens=900) as stream:
        next(stream)
        assert random_braid.stats().pool_used_bytes > used
    assert pool_of(random_braid).used_bytes == used
    with pytest.raises(StopIteration):
        next(stream)


def test_streams_may_interleave(random_braid: Braid) -> None:
    context = random_braid.compose([random_braid.register(TEXTS[0])])
    other = random_braid.compose([random_braid.register(TEXTS[1])])
    expected = [c.ask("Well?", max_new_tokens=9).text for c in (context, other)]
    streams = [c.stream("Well?", max_new_tokens=9) for c in (context, other)]
    texts = ["", ""]
    for _ in range(10):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")
    assert texts == expected


def test_explain_names_positions_and_reasons(random_braid: Braid) -> None:
    rules = random_braid.register_system(SYSTEM, name="rules")
    a = random_braid.register(TEXTS[0], name="a", anchor=rules)
    b = random_braid.register(TEXTS[1], name="b")
    explained = random_braid.compose([rules, b, a]).explain()
    assert [row.label for row in explained.chunks] == ["rules", "b", "a"]
    assert [row.position for row in explained.chunks] == [0, len(rules.token_ids), len(rules.token_ids + b.token_ids)]
    assert [row.hit for row in explained.chunks] == [True, False, True]
    assert explained.chunks[2].after == ("rules",)
    assert all(row.kv_bytes > 0 for row in explained.chunks)
    assert explained.missing_tokens == len(b.token_ids)
    text = str(explained)
    assert "miss b" in text
    assert "hit  a" in text
    alone = random_braid.compose([rules, a], mode="isolated").explain()
    assert "after" in alone.chunks[1].reason, "an entry computed after something else is named as the reason"


def test_exact_stays_in_memory_and_reaches_the_store_only_when_kept(random_braid: Braid) -> None:
    chunks = [random_braid.register_system(SYSTEM), *random_braid.register_many(TEXTS)]
    stored = random_braid.stats().entries
    random_braid.ask("Well?", chunks=chunks, mode="exact", max_new_tokens=1)
    assert random_braid.stats().entries == stored
    usage = random_braid.ask("Well?", chunks=chunks, mode="exact", max_new_tokens=1).usage
    assert usage.cached_tokens == sum(len(chunk.token_ids) for chunk in chunks)
    assert random_braid.compose(chunks, mode="exact", keep=True).prepare() == 0, "memory holds it: only written"
    assert random_braid.stats().entries == stored + len(TEXTS)


def test_deleting_a_chunk_removes_every_chain_computed_with_sight_of_it(random_braid: Braid) -> None:
    rules = random_braid.register_system(SYSTEM)
    a, b, c = random_braid.register_many(TEXTS, anchor=rules)
    random_braid.compose([rules, a, b, c], mode="exact", keep=True).prepare()
    assert random_braid.chunks.delete(a) == 3, "its own entry, and b and c behind it"
    with pytest.raises(UnknownChunkError):
        random_braid.compose([rules, a])
    assert [row.hit for row in random_braid.compose([rules, b, c]).explain().chunks] == [True, True, True]
    assert not random_braid.compose([rules, b, c], mode="exact").explain().chunks[2].hit
    assert random_braid.chunks.list() == [rules, b, c]


@pytest.mark.parametrize("mode", ["exact", "anchored", "isolated"])
@pytest.mark.parametrize("by", ["this process", "another"])
def test_a_composed_context_does_not_bring_a_deleted_chunk_back(
    random_braid: Braid, tmp_path: Path, mode: str, by: str
) -> None:
    document, other = random_braid.register_many(TEXTS[:2])
    context = random_braid.compose([document, other], mode=mode)
    context.ask("Well?", max_new_tokens=1)
    assert [row.where for row in context.explain().chunks[-2:]] == ["memory"] * 2
    if by == "another":
        with ChunkStore(tmp_path / "store") as store:
            store.delete_chunk("default", document.id)
    else:
        random_braid.chunks.delete(document)
    with pytest.raises(UnknownChunkError, match="Register it again"):
        context.ask("Well?", max_new_tokens=1)
    assert random_braid.chunks.list() == [other]
    _header, first, second = random_braid.compose(random_braid.register_many(TEXTS[:2]), mode=mode).explain().chunks
    assert not first.hit
    assert second.hit == (mode != "exact"), "exact computed it with sight of the first"


def test_what_another_process_deleted_is_stored_again_when_registered_again(
    random_braid: Braid, tmp_path: Path
) -> None:
    rules = random_braid.register_system(SYSTEM)
    document = random_braid.register(TEXTS[0], anchor=rules)
    random_braid.ask("Well?", chunks=[rules, document], max_new_tokens=1)
    with ChunkStore(tmp_path / "store") as store:
        store.delete_chunk("default", document.id)
        random_braid.register(TEXTS[0], anchor=rules)
        assert store.stats("default").entries == 2


def test_many_short_texts_register_in_a_small_pool(random_checkpoint: Path, tmp_path: Path, page_bytes: int) -> None:
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu", pool_bytes=8 * page_bytes) as braid:
        rules = braid.register_system(SYSTEM)
        braid.register_many([f"Fact {n}." for n in range(30)], anchor=rules)
        assert braid.stats().entries == 31


def test_a_chunk_of_another_braid_is_encoded_by_this_one(
    random_braid: Braid, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint()
    template = (folder / "chat_template.jinja").read_text().replace("message.role +", "'the ' + message.role +")
    (folder / "chat_template.jinja").write_text(template)
    rules = random_braid.register_system(SYSTEM)
    with Braid(folder, store=tmp_path / "store", device="cpu") as other:
        assert rules.token_ids != other.chunks.get(rules.id).token_ids
        assert other.compose([rules]).input_ids == other.compose([rules.id]).input_ids


def test_the_clock_of_a_call_starts_with_the_call(random_braid: Braid, monkeypatch: pytest.MonkeyPatch) -> None:
    context, busy = random_braid.compose([]), threading.Event()

    def slow(*given):  # type: ignore[no-untyped-def]
        if not busy.is_set():
            busy.set()
            time.sleep(0.6)  # of which the question waits most, however busy the machine
        return forward(*given)

    monkeypatch.setattr("braidsdk.engine.runner.forward", slow)
    other = threading.Thread(target=context.ask, args=("And then?",), kwargs={"max_new_tokens": 1})
    other.start()
    assert busy.wait(30.0)
    assert context.ask("Well?", max_new_tokens=1).timings.first_token_ms > 250
    other.join()


def test_a_braid_says_what_it_computes_in(random_braid: Braid) -> None:
    assert "torch.float32 on cpu" in repr(random_braid)


def test_a_small_pool_still_answers_right(
    random_braid: Braid, random_checkpoint: Path, tmp_path: Path, page_bytes: int
) -> None:
    texts = [f"Document number {n}. " * 12 for n in range(12)]
    chunks = random_braid.register_many(texts)
    want = [random_braid.ask("Well?", chunks=[each], max_new_tokens=5).token_ids for each in chunks]
    options = {"device": "cpu", "dtype": "float32", "pool_bytes": 6 * page_bytes}
    with Braid(random_checkpoint, store=tmp_path / "small", **options) as small:
        for _ in range(2):
            there = small.register_many(texts)
            assert [small.ask("Well?", chunks=[each], max_new_tokens=5).token_ids for each in there] == want
        assert small.stats().pool_capacity_bytes == 6 * page_bytes


def test_the_window_ends_the_answer(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(max_position_embeddings=40, eos_token_id=1019)
    with Braid(folder, store=tmp_path / "store", device="cpu") as braid:
        answer = braid.ask("Well?", chunks=[])
        assert len(answer.prompt_ids) + len(answer.token_ids) == 40
        assert answer.finish_reason == "length"


def test_logits_are_a_plain_tensor(random_braid: Braid) -> None:
    logits = random_braid.compose([]).next_token_logits("Well?")
    assert logits.shape == (1024,)
    assert logits.dtype == torch.float32
    logits += 1.0


def test_everything_after_close_is_a_typed_error(random_checkpoint: Path, tmp_path: Path) -> None:
    braid = Braid(random_checkpoint, store=tmp_path / "store", device="cpu")
    chunk = braid.register(TEXTS[0])
    context = braid.compose([chunk])
    braid.close()
    braid.close()
    for call in (
        lambda: braid.register("x"),
        lambda: braid.compose([chunk]),
        lambda: braid.chunks.list(),
        lambda: braid.chunks.get("x"),
        lambda: context.ask("x"),
        lambda: context.explain(),
        lambda: context.prepare(),
        lambda: context.next_token_logits("x"),
        lambda: braid.device,
        lambda: braid.dtype,
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
