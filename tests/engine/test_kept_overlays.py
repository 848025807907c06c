"""`keep=True` and a mode that repairs: what was computed again is stored, and used again for the same tokens of the
same entries, by later questions and later processes."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from braidsdk import Answer, Braid, Chunk, Context
from braidsdk.cache.resident import Resident
from braidsdk.compose.repairs import overlay_key
from braidsdk.errors import UnknownChunkError
from braidsdk.kernels.attention import eager
from braidsdk.store import EntryKey, blobs
from braidsdk.types import LEVEL_OVERLAY

RULES = "You answer questions from the documents."
TEXTS = [
    "The capital of Thessily is Troick. Thessily lies on the sea.",
    "The capital of Belmora is Plonk. Belmora lies in the north, and its queen is old.",
    "The capital of Aistonia is Flubarg.",
    "The capital of Falkirra is Jassik.",
]
ASK, OTHER = "What is the capital of Aistonia?", "Who is old, and where does she live? Say it in one short sentence."
MODES = ["linked(5)", "linked(1000)", "linked(3)+shift", "guided(0.2)", "guided(0.2)+shift", "blended(0.3)"]


def chunks_of(braid: Braid) -> list[Chunk]:
    rules = braid.register_system(RULES, name="rules")
    return [rules, *braid.register_many(TEXTS, names=["a", "b", "c", "d"], anchor=rules)]


def answered(context: Context, question: str = ASK) -> Answer:
    return context.ask(question, max_new_tokens=12, stop_ids=[])


def overlays(braid: Braid) -> int:
    """How many are stored."""
    return sum(group.entries for group in braid.stats().groups if group.level == LEVEL_OVERLAY)


def resident(braid: Braid) -> list[Resident]:
    """Those in memory, the least recently used first."""
    found: list[Resident] = braid._engine.call(lambda: list(braid._engine.pool._overlays.values()))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_without_bit_for_bit(
    mode: str, make_braid: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed for the first time, and taken from memory and from the store, for the same question and for another one.
    Here the reference computes attention: torch's cuts the context where pages do not follow one another, so that
    where pages lie changes its rounding."""
    monkeypatch.setattr(eager, "FLASH_DTYPES", ())
    with make_braid() as braid:
        chunks = chunks_of(braid)
        without = braid.compose(chunks, mode=mode)
        wanted = {each: (without.next_token_logits(each), answered(without, each)) for each in (ASK, OTHER)}
        assert (overlays(braid), resident(braid)) == (0, []), "nothing is kept unless it is asked for"
        context = braid.compose(chunks, mode=mode, keep=True)
        for question, hits in ((ASK, False), (ASK, True), (OTHER, mode[0] in "lb"), (OTHER, True)):
            answer = answered(context, question)
            assert answer.token_ids == wanted[question][1].token_ids
            assert bool(answer.usage.repaired_tokens) != hits
            assert torch.equal(context.next_token_logits(question), wanted[question][0])
    for question in (OTHER, ASK):
        with make_braid() as braid:
            context = braid.compose(chunks, mode=mode, keep=True)
            assert torch.equal(context.next_token_logits(question), wanted[question][0])
            answer = answered(context, question)
            assert answer.token_ids == wanted[question][1].token_ids
            assert answer.usage.repaired_tokens == 0


@pytest.mark.parametrize("mode", ["linked(5)", "guided(0.2)+shift"])
def test_the_same_pages_give_the_same_bits(mode: str, make_braid: Callable[..., Braid]) -> None:
    """As above, with torch's attention: the first call of a process takes the same pages, whether there is an overlay
    in the store or not."""
    with make_braid() as braid:
        chunks = chunks_of(braid)
    logits = []
    for keep in (None, True, True):
        with make_braid() as braid:
            logits.append(braid.compose(chunks, mode=mode, keep=keep).next_token_logits(ASK))
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])


def test_linked_repairs_once_for_all_questions(random_braid: Braid) -> None:
    context = random_braid.compose(chunks_of(random_braid), mode="linked(5)", keep=True)
    first, second = answered(context), answered(context, OTHER)
    assert first.usage.repaired_tokens == 15
    assert first.usage.budget > 0
    assert (second.usage.repaired_tokens, second.usage.budget) == (0, 0)
    assert second.usage.cached_tokens == len(context.input_ids)
    stats = random_braid.stats()
    assert (stats.hits, stats.misses) == (11, 1), "five entries of chunks in each, and the overlay"
    assert overlays(random_braid) == 1


@pytest.mark.parametrize("mode", ["guided(0.2)", "guided(0.2)+shift", "blended(0.3)"])
def test_choosing_is_charged_and_the_same_choice_is_taken(mode: str, random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    context = random_braid.compose(chunks, mode=mode, keep=True)
    first, second = answered(context), answered(context)
    documents = sum(len(chunk.token_ids) for chunk in chunks[1:])
    assert first.usage.repaired_tokens > 0
    assert second.usage.repaired_tokens == 0
    assert 0 < second.usage.budget == pytest.approx(first.usage.budget - first.usage.repaired_tokens / documents)
    if mode.startswith("guided"):
        assert answered(context, OTHER).usage.repaired_tokens > 0, "another question chooses other tokens"
        assert overlays(random_braid) == 2
    else:
        assert answered(context, OTHER).usage.repaired_tokens == 0, "it does not ask the question"


CHILD = """
import json, sys
from braidsdk import Braid
with Braid(sys.argv[1], store=sys.argv[2], device="cpu", dtype="float32") as braid:
    context = braid.compose(["rules", "a", "b", "c", "d"], mode=sys.argv[3], keep=True)
    notes = context.explain().notes
    answer = context.ask(sys.argv[4], max_new_tokens=12, stop_ids=[])
    stats = braid.stats()
    print(json.dumps([notes, answer.token_ids, answer.usage.repaired_tokens, stats.hits, stats.misses]))
"""


@pytest.mark.parametrize("mode", ["linked(5)", "guided(0.2)+shift"])
def test_a_second_process_takes_it_from_the_store(mode: str, random_checkpoint: Path, tmp_path: Path) -> None:
    with Braid(random_checkpoint, store=tmp_path, device="cpu", dtype="float32") as braid:
        wanted = answered(braid.compose(chunks_of(braid), mode=mode, keep=True)).token_ids
    command = [sys.executable, "-P", "-c", CHILD, str(random_checkpoint), str(tmp_path), mode, ASK]
    done = subprocess.run(command, check=True, capture_output=True)
    notes, token_ids, repaired_tokens, hits, misses = json.loads(done.stdout)
    assert tuple(token_ids) == wanted
    assert (repaired_tokens, hits, misses) == (0, 6, 0)
    assert (notes[-1] == "what every question takes of these 15 tokens is in store") == mode.startswith("linked")


def test_preparing_computes_what_is_the_same_for_all_questions(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    wanted = answered(random_braid.compose(chunks, mode="linked(5)+shift")).token_ids
    context = random_braid.compose(chunks, mode="linked(5)+shift", keep=True)
    assert len(context.explain().notes) == 1
    assert context.prepare() == 15
    assert context.explain().notes[-1].endswith("15 tokens is in memory")
    assert context.prepare() == 0
    answer = answered(context)
    assert (answer.token_ids, answer.usage.repaired_tokens) == (wanted, 0)
    assert random_braid.compose(chunks, mode="linked(6)").prepare() == 0
    assert random_braid.compose(chunks, mode="guided(0.2)", keep=True).prepare() == 0


@pytest.mark.parametrize("keep", [None, False])
@pytest.mark.parametrize("mode", ["linked(5)", "guided(0.2)"])
def test_without_keep_nothing_is_stored_and_nothing_taken(mode: str, keep: bool | None, random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    answered(random_braid.compose(chunks, mode=mode, keep=True))
    before = random_braid.stats()
    private = random_braid.compose(chunks, mode=mode, keep=keep)
    for _ in range(2):
        assert answered(private).usage.repaired_tokens > 0
    after = random_braid.stats()
    assert (after.entries, after.hits, after.misses) == (before.entries, before.hits + 10, before.misses)
    assert len(resident(random_braid)) == 1


@pytest.mark.parametrize("keep", [None, True])
def test_what_lay_on_its_pages_before_does_no_harm(keep: bool | None, random_braid: Braid) -> None:
    context = random_braid.compose(chunks_of(random_braid), mode="guided(0.2)+shift", keep=keep)
    pool = random_braid._engine.pool
    logits = context.next_token_logits(OTHER)
    for question in (ASK, OTHER):
        pool.kv[:, :, list(pool._free)] = float("nan")
        assert len(answered(context, question).token_ids) == 12
    assert torch.allclose(context.next_token_logits(OTHER), logits, atol=1e-4)


# whose it is


@pytest.mark.parametrize(
    "other",
    [
        {"order": "rules b a c d"},
        {"order": "rules a b d c"},
        {"order": "rules a b c"},
        {"order": "rules a b c d a"},
        {"order": "a b c d"},
        {"mode": "linked(6)"},
        {"mode": "linked(5)+shift"},
    ],
    ids=str,
)
def test_another_composition_or_mode_computes_its_own(other: dict[str, str], random_braid: Braid) -> None:
    chunks_of(random_braid)
    mode, order = other.get("mode", "linked(5)"), other.get("order", "rules a b c d").split()
    random_braid.compose(order, mode=mode).prepare()
    wanted = answered(random_braid.compose(order, mode=mode))
    answered(random_braid.compose(["rules", "a", "b", "c", "d"], mode="linked(5)", keep=True))
    answer = answered(random_braid.compose(order, mode=mode, keep=True))
    assert answer.usage == wanted.usage
    assert answer.token_ids == wanted.token_ids
    assert overlays(random_braid) == 2


def test_the_same_tokens_by_another_rule_are_another_overlay(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    every = [random_braid.compose(chunks, mode=each, keep=True) for each in ("linked(1000)", "guided(1)", "blended(1)")]
    assert len({answered(context).usage.repaired_tokens for context in every}) == 1
    assert overlays(random_braid) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"namespace": "other"},
        {"dtype": "bfloat16"},
        {"weights": "int8"},
        {"model": {"seed": 1}},
        {"model": {"rms_norm_eps": 0.5}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Weights in int8")
def test_another_model_dtype_or_namespace_misses(
    change: dict[str, object], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_checkpoint("first")
    for changes, hits in (({}, False), (change, False), ({}, True)):
        different = changes.get("model")
        path = make_checkpoint("second", **different) if isinstance(different, dict) else model
        options = {"dtype": "float32", **{name: value for name, value in changes.items() if name != "model"}}
        with Braid(path, store=tmp_path / "store", device="cpu", **options) as braid:  # type: ignore[arg-type]
            context = braid.compose(chunks_of(braid), mode="linked(5)", keep=True)
            assert (answered(context).usage.repaired_tokens == 0) == hits


def parts_of_a_key(braid: Braid) -> tuple[list[EntryKey], dict[str, EntryKey]]:
    """The keys of a composition's entries, and its overlay's with one thing changed at a time."""
    chunks = chunks_of(braid)
    composition = braid.compose(chunks, mode="guided(0.2)")._composition
    keys = list(braid._engine.keys(composition))
    second, third = (segment.origin for segment in composition.segments[2:4])
    at = [second, second + 1, second + 4]
    assert composition.input_ids[second] == composition.input_ids[third]
    other = replace(keys[4], after_sha256="0" * 64)
    seen_more = braid._engine.keys(braid.compose(chunks, mode="exact")._composition)
    swapped = replace(composition, segments=tuple(composition.segments[each] for each in (0, 2, 1, 3, 4)))
    made = {
        "as it is": overlay_key(composition, keys, at),
        "mode": overlay_key(replace(composition, mode="guided(0.3)"), keys, at),
        "positions": overlay_key(composition, keys, [second, second + 2, second + 4]),
        "fewer positions": overlay_key(composition, keys, at[:1]),
        "other positions of the same tokens": overlay_key(composition, keys, [third]),
        "an entry that is not repaired": overlay_key(composition, [keys[0], other, *keys[2:]], at),
        "an entry behind it": overlay_key(composition, [*keys[:4], other], at),
        "entries with more sight": overlay_key(composition, seen_more, at),
        "order": overlay_key(swapped, [keys[each] for each in (0, 2, 1, 3, 4)], at),
        "model": overlay_key(composition, [replace(keys[0], model=replace(keys[0].model, dtype="x")), *keys[1:]], at),
        "namespace": overlay_key(composition, [replace(keys[0], namespace="x"), *keys[1:]], at),
    }
    return keys, made


def test_each_part_of_its_key_matters(random_braid: Braid) -> None:
    keys, made = parts_of_a_key(random_braid)
    assert len({key.digest for key in made.values()}) == len(made)
    assert {key.digest for key in made.values()}.isdisjoint(key.digest for key in keys)
    assert {key.level for key in made.values()} == {LEVEL_OVERLAY}
    assert made["namespace"].namespace == "x"
    assert made["as it is"].chunk_ids() == tuple(key.chunk_id for key in keys)


def test_the_question_and_past_turns_do_not_matter(
    make_braid: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand behind all of it: its values are the same whatever is asked, and so is its key."""
    monkeypatch.setattr(eager, "FLASH_DTYPES", ())  # where pages lie changes the rounding of torch's attention
    past = [{"role": "user", "content": OTHER}, {"role": "assistant", "content": "Far away."}]
    computed = []
    for number, (question, history) in enumerate([(ASK, []), (OTHER, []), (ASK, past)]):
        with make_braid(f"store {number}") as braid:
            context = braid.compose(chunks_of(braid), mode="linked(5)+shift", keep=True)
            context.ask(question, history=history, max_new_tokens=4)
            (overlay,) = resident(braid)
            computed.append((overlay.key, braid._engine.pool.kv[:, :, overlay.pages].clone()))
            for asked, before in ((ASK, past), (OTHER, [])):
                assert context.ask(asked, history=before, max_new_tokens=4).usage.repaired_tokens == 0
    (key, values), *others = computed
    assert all(other == key and torch.equal(same, values) for other, same in others)


def test_a_turn_that_saw_it_is_not_taken_for_one_without(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    context = random_braid.compose(chunks, mode="linked(1000)", keep=True)
    history: list[dict[str, str]] = []
    for _ in range(2):
        history = [{"role": "user", "content": ASK}, {"role": "assistant", "content": answered(context).text}]
    stats = random_braid.stats()
    answered_on = context.ask(OTHER, history=history, max_new_tokens=4)
    assert answered_on.usage.repaired_tokens == 0
    assert random_braid.stats().misses == stats.misses + 1, "the turn is computed as in anchored"


def test_together_it_is_computed_once(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    wanted = [answered(random_braid.compose(chunks, mode=mode)).token_ids for mode in MODES]
    contexts = [random_braid.compose(chunks, mode=mode, keep=True) for mode in MODES for _ in range(3)]
    answers = random_braid.ask_many([(each, ASK) for each in contexts], max_new_tokens=12, stop_ids=[])
    assert [answer.token_ids for answer in answers] == [each for each in wanted for _ in range(3)]
    repairs = [[bool(answer.usage.repaired_tokens) for answer in answers[at : at + 3]] for at in range(0, 18, 3)]
    assert all(sum(each) == 1 for each in repairs), repairs
    assert overlays(random_braid) == len(MODES)


def test_who_waits_for_it_goes_on_if_who_computes_it_is_cancelled(
    random_braid: Braid, monkeypatch: pytest.MonkeyPatch, settled: Callable[[Braid], None]
) -> None:
    context = random_braid.compose(chunks_of(random_braid), mode="linked(5)", keep=True)
    wanted = answered(random_braid.compose(chunks_of(random_braid), mode="linked(5)")).token_ids
    engine = random_braid._engine
    loop, first = engine._loop, context.request(ASK, None, None, {"max_new_tokens": 4})
    honest, failed = loop._compute, []

    def fails_once(parts: Sequence[object], rows: Sequence[object]) -> object:
        if any(getattr(part, "request", None) is first for part in parts):
            failed.append(first)
            raise RuntimeError("out of luck")
        return honest(parts, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_compute", fails_once)
    second = context.request(ASK, None, None, {"max_new_tokens": 12, "stop_ids": []})
    engine.submit(first)
    engine.submit(second)
    second.wait()
    assert failed
    assert (tuple(second.tokens), second.repaired_tokens) == (wanted, 15)
    settled(random_braid)


def test_sources_count_it_for_its_chunks(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    shares = []
    for keep in (None, True, True):
        answer = random_braid.compose(chunks, mode="guided(0.4)+shift", keep=keep).ask(ASK, sources=True)
        assert answer.sources is not None
        shares.append({source.chunk.id: source.share for source in answer.sources})
    assert shares[0] == shares[1] == shares[2]


# what makes it go


@pytest.mark.parametrize("name", ["rules", "a", "d"])
def test_it_goes_with_each_of_its_chunks(name: str, random_braid: Braid, tmp_path: Path) -> None:
    chunks_of(random_braid)
    order = ["rules", "a", "b", "c", "d"]
    context = random_braid.compose(order, mode="linked(5)", keep=True)
    answered(context)
    files = set((tmp_path / "store" / "entries").rglob("*.safetensors"))
    random_braid.chunks.delete(name)
    assert (overlays(random_braid), resident(random_braid)) == (0, [])
    left = set((tmp_path / "store" / "entries").rglob("*.safetensors"))
    assert len(left) == random_braid.stats().entries < len(files) - 1
    with pytest.raises(UnknownChunkError):
        answered(context)
    chunks_of(random_braid)
    again = random_braid.compose(order, mode="linked(5)", keep=True)
    assert answered(again).usage.repaired_tokens == 15
    assert answered(again).usage.repaired_tokens == 0


def test_a_chunk_that_is_deleted_meanwhile_takes_it_along(
    random_braid: Braid, until: Callable[[Callable[[], object]], None], settled: Callable[[Braid], None], tmp_path: Path
) -> None:
    context = random_braid.compose(chunks_of(random_braid), mode="linked(5)", keep=True)
    for new in (True, False):
        stream = context.stream(ASK, max_new_tokens=300, stop_ids=[])
        next(stream)
        random_braid.chunks.delete("d")
        assert (overlays(random_braid), resident(random_braid)) == (0, [])
        assert len(list(stream)) > 0
        assert (stream.answer.usage.repaired_tokens > 0) == new
        settled(random_braid)
        chunks_of(random_braid)
        answered(context)
        assert overlays(random_braid) == 1
    files = list((tmp_path / "store" / "entries").rglob("*.safetensors"))
    assert len(files) == random_braid.stats().entries


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_file_is_computed_again(how: str, make_braid: Callable[..., Braid]) -> None:
    with make_braid() as braid:
        chunks = chunks_of(braid)
        wanted = answered(braid.compose(chunks, mode="linked(5)+shift", keep=True)).token_ids
        (overlay,) = resident(braid)
        (hit,) = braid._engine.store.look_up([overlay.key])
        assert hit
    data = bytearray(hit.path.read_bytes())
    if how == "missing":
        hit.path.unlink()
    else:
        data[-9] ^= 16
        hit.path.write_bytes(data if how == "flipped" else data[:-100])
    for first in (True, False):
        with make_braid() as braid:
            answer = answered(braid.compose(chunks, mode="linked(5)+shift", keep=True))
            assert answer.token_ids == wanted
            assert bool(answer.usage.repaired_tokens) == first
            assert (braid.stats().damaged, overlays(braid)) == (1, 1)


def test_a_rebuilt_index_knows_it(make_braid: Callable[..., Braid], tmp_path: Path) -> None:
    with make_braid() as braid:
        chunks = chunks_of(braid)
        answered(braid.compose(chunks, mode="guided(0.2)+shift", keep=True))
        entries = braid.stats().entries
    for file in (tmp_path / "store").glob("index.db*"):
        file.unlink()
    with make_braid() as braid:
        assert (braid.stats().entries, overlays(braid), braid.stats().damaged) == (entries, 1, 0)
        assert answered(braid.compose(chunks, mode="guided(0.2)+shift", keep=True)).usage.repaired_tokens == 0
        braid.chunks.delete(chunks[2].id)
        assert overlays(braid) == 0


def test_a_full_disk_leaves_it_out_and_nothing_else(
    random_braid: Braid, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    rules = random_braid.register_system(RULES)
    chunks = [rules, *random_braid.register_many(TEXTS)]  # with nothing computed
    wanted = answered(random_braid.compose(chunks, mode="linked(5)", keep=False)).token_ids
    honest = blobs.write

    def full(path: Path, *, key: EntryKey, **rest: object) -> str:
        if key.level == LEVEL_OVERLAY:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(path, key=key, **rest)  # type: ignore[arg-type]

    context = random_braid.compose(chunks, mode="linked(5)", keep=True)
    with monkeypatch.context() as patched:
        patched.setattr(blobs, "write", full)
        assert answered(context).token_ids == wanted
        assert answered(context).usage.repaired_tokens == 0, "it is in memory all the same"
    assert (random_braid.stats().entries, overlays(random_braid)) == (5, 0)
    assert not list((tmp_path / "store" / "tmp").glob("*.part"))
    assert [each.getMessage() for each in caplog.records if "overlay" in each.getMessage()] == [
        "an overlay was not stored: StoreFullError"
    ] * 2
    assert answered(context).usage.repaired_tokens == 0
    assert overlays(random_braid) == 1, "it is stored as soon as there is room"


def test_it_gives_way_before_any_other_entry(make_braid: Callable[..., Braid], page_bytes: int) -> None:
    """The pool holds six pages: one of three entries, two of overlays, and what a call takes. Four more are then
    needed."""
    with make_braid(pool_bytes=6 * page_bytes) as braid:
        rules = braid.register_system(RULES)
        chunks = [rules, *braid.register_many(TEXTS[:2], anchor=rules)]
        first, second = (braid.compose(chunks, mode=mode, keep=True) for mode in ("linked(5)", "linked(6)"))
        answered(first)
        answered(second)
        assert [each.tokens for each in resident(braid)] == [5, 6]
        answered(first)
        assert [each.tokens for each in resident(braid)] == [6, 5]
        (long,) = braid.register_many(["Oslo is cold. " * 55], anchor=rules, progress=False)
        assert 3 * 128 < len(long.token_ids) <= 4 * 128
        assert [row.where for row in first.explain().chunks] == ["memory"] * 3
        assert [each.tokens for each in resident(braid)] == [5]
        assert answered(second).usage.repaired_tokens == 0, "from the store"
