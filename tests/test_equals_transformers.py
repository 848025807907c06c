"""Models of every family, plain and composed with `exact`, against transformers on the same ids."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from braidsdk import Braid
from braidsdk.cache.pool import PAGE_SIZE
from braidsdk.compose.composition import Composition, Segment
from braidsdk.engine.loop import STEP_TOKENS
from braidsdk.models import decoder
from braidsdk.models.registry import FAMILIES

TailLogits = Callable[[Braid, Composition], torch.Tensor]
Check = Callable[[Braid, PreTrainedModel, Composition], None]

TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit. float32 sums in another order; we have seen 1e-6 to 2e-6."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(1019) for _ in range(count))


def exact(pieces: Sequence[tuple[int, ...]], tail: tuple[int, ...]) -> Composition:
    """An exact composition of bare ids, kept in memory only."""
    origins = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    segments = [
        Segment(None, piece, origin, tuple(range(index)), keep=False)
        for index, (piece, origin) in enumerate(zip(pieces, origins, strict=False))
    ]
    return Composition("exact", tuple(segments), tail=tail)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def checkpoint(
    request: pytest.FixtureRequest, save_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random checkpoint of each family; do not write to it."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), family=request.param)


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def braid(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Braid]:
    with Braid(checkpoint, store=tmp_path_factory.mktemp("store"), device="cpu", dtype="float32") as opened:
        yield opened


@pytest.fixture
def check(tail_logits: TailLogits) -> Check:
    return partial(_check, tail_logits)


@torch.inference_mode()
def _check(tail_logits: TailLogits, braid: Braid, peer: PreTrainedModel, composition: Composition) -> None:
    want = peer(torch.tensor([composition.input_ids])).logits[0, -1]
    got = tail_logits(braid, composition)
    assert relative_error(got, want) < TOLERANCE, [len(segment.token_ids) for segment in composition.segments]


PAGE = PAGE_SIZE["cpu"]


@pytest.mark.parametrize("length", [1, 2, PAGE - 1, PAGE, PAGE + 1, 700])
def test_a_plain_prompt(check: Check, braid: Braid, peer: PreTrainedModel, length: int) -> None:
    check(braid, peer, Composition("exact", (), tail=tokens(length, length)))


def test_every_split_of_a_prompt_in_two(check: Check, braid: Braid, peer: PreTrainedModel) -> None:
    ids = tokens(PAGE + 8, 1)
    for cut in range(1, len(ids)):
        check(braid, peer, exact([ids[:cut]], ids[cut:]))


def test_all_orders_of_four_chunks_of_odd_lengths(check: Check, braid: Braid, peer: PreTrainedModel) -> None:
    pieces = [tokens(count, count) for count in (1, PAGE - 1, PAGE, PAGE + 1)]
    for order in itertools.permutations(pieces):
        check(braid, peer, exact(order, tokens(9, 9)))


def test_neighbours_of_whole_pages(check: Check, braid: Braid, peer: PreTrainedModel) -> None:
    pieces = [tokens(count * PAGE, count) for count in (2, 1, 1, 2)]
    check(braid, peer, exact(pieces, tokens(3, 7)))


def test_the_same_chunk_twice(check: Check, braid: Braid, peer: PreTrainedModel) -> None:
    piece = tokens(PAGE + 3, 5)
    check(braid, peer, exact([piece, tokens(7, 6), piece, piece], tokens(4, 7)))


def test_a_chain_longer_than_one_batch(
    check: Check, checkpoint: Path, tmp_path: Path, peer: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEP_TOKENS, "cpu", 50)
    with Braid(checkpoint, store=tmp_path, device="cpu", dtype="float32") as opened:
        check(opened, peer, exact([tokens(120, 1), tokens(30, 2), tokens(49, 3)], tokens(101, 4)))
        assert opened.stats().steps >= 300 / 50


@torch.inference_mode()
def test_all_orders_of_registered_texts(braid: Braid, peer: PreTrainedModel) -> None:
    texts = [f"{name} is a city. " * count for name, count in (("Oslo", 1), ("Rome", 4), ("Bern", 9), ("Graz", 2))]
    docs = braid.register_many(texts)
    for order in itertools.permutations(docs):
        context = braid.compose(order, mode="exact")
        prompt = context.prompt_ids("Which?")
        want = peer(torch.tensor([prompt])).logits[0, -1]
        assert relative_error(context.next_token_logits("Which?"), want) < TOLERANCE


@pytest.mark.parametrize("mode", ["exact", "isolated"])
def test_64_greedy_tokens_equal_generate(braid: Braid, peer: PreTrainedModel, mode: str) -> None:
    context = braid.compose(
        [braid.register("A fact. Another fact, longer than it.")] if mode == "exact" else [], mode=mode
    )
    answer = context.ask("What follows?", max_new_tokens=64)
    prompt = torch.tensor([answer.prompt_ids])
    want = peer.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=1019
    )
    assert answer.token_ids == tuple(want[0, prompt.shape[1] :].tolist())


@torch.inference_mode()
def test_a_composition_that_is_not_exact_is_told_apart(braid: Braid, peer: PreTrainedModel) -> None:
    """The tolerance is tight enough: chunks that are computed alone exceed it by orders of magnitude."""
    context = braid.compose(braid.register_many(["One fact stands here.", "And one more."]), mode="isolated")
    prompt = context.prompt_ids("Which?")
    want = peer(torch.tensor([prompt])).logits[0, -1]
    assert relative_error(context.next_token_logits("Which?"), want) > 100 * TOLERANCE


def _without(*names: str) -> Callable[[decoder.Layer], decoder.Layer]:
    return lambda layer: replace(layer, qkv=replace(layer.qkv, **dict.fromkeys(names)))


def _heads_swapped(layer: decoder.Layer) -> decoder.Layer:
    return replace(layer, out=layer.out.roll(8, dims=1))


BUGS = {
    "the biases are forgotten": (("qwen2", "llama"), _without("bias")),
    "the norms of heads are forgotten": (("qwen3",), _without("q_norm", "k_norm")),
    "heads are swapped": (sorted(FAMILIES), _heads_swapped),
}


@pytest.mark.parametrize(("family", "bug"), [(family, bug) for bug, (found, _) in BUGS.items() for family in found])
@torch.inference_mode()
def test_a_planted_bug_is_told_apart(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    tail_logits: TailLogits,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    bug: str,
) -> None:
    honest = decoder.Decoder.__init__

    def init(self: decoder.Decoder, *numbers: Any, layers: tuple[decoder.Layer, ...], **parts: Any) -> None:
        honest(self, *numbers, layers=(layers[0], BUGS[bug][1](layers[1]), *layers[2:]), **parts)

    monkeypatch.setattr(decoder.Decoder, "__init__", init)
    folder = make_checkpoint(family=family)
    composition = exact([tokens(70, 1), tokens(5, 2)], tokens(12, 3))
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(
        torch.tensor([composition.input_ids])
    )
    with Braid(folder, store=tmp_path / "store", device="cpu", dtype="float32") as opened:
        error = relative_error(tail_logits(opened, composition), want.logits[0, -1])
    assert error > 100 * TOLERANCE


@pytest.mark.parametrize(
    "geometry",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 56},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 896},
    ],
    ids=lambda geometry: ",".join(geometry),
)
@torch.inference_mode()
def test_other_geometries(
    make_checkpoint: Callable[..., Path], tmp_path: Path, check: Check, geometry: dict[str, object]
) -> None:
    folder = make_checkpoint(**geometry)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with Braid(folder, store=tmp_path / "store", device="cpu", dtype="float32") as opened:
        check(opened, other, exact([tokens(70, 1), tokens(5, 2)], tokens(12, 3)))


@torch.inference_mode()
def test_bfloat16_is_as_close_to_float64_as_transformers_is(
    random_checkpoint: Path, tmp_path: Path, tail_logits: TailLogits
) -> None:
    """RMS error of the logits over 12 prompts, ours over theirs; the geometric mean scatters by about 0.03 here."""
    composed = [exact([tokens(90, seed), tokens(33, seed + 50)], tokens(12, seed + 99)) for seed in range(12)]

    def ours(dtype: str) -> list[torch.Tensor]:
        with Braid(random_checkpoint, store=tmp_path / dtype, device="cpu", dtype=dtype) as opened:
            return [tail_logits(opened, c).double() for c in composed]

    truth, rounded = ours("float64"), ours("bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.bfloat16).eval()
    logs = []
    for composition, exact_logits, logits in zip(composed, truth, rounded, strict=True):
        baseline = theirs(torch.tensor([composition.input_ids])).logits[0, -1].double()
        ratio = (logits - exact_logits).square().mean() / (baseline - exact_logits).square().mean()
        logs.append(float(ratio.log()) / 2)
    mean = torch.tensor(logs).mean().exp()
    assert mean < 1.05, f"geometric mean of the RMS error ratios is {mean:.3f}"
