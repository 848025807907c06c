"""Handing a composed context to transformers: its `generate` goes on from our cache."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, Qwen3ForCausalLM

from braidsdk import Braid, Context

TEXTS = ["Oslo is a city. " * 6, "Rome is a city too, and Bern.", "Graz is one. " * 9]
QUESTION = "Which of them?"


@pytest.fixture(scope="module")
def peer(random_checkpoint: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def braid(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Braid]:
    with Braid(random_checkpoint, store=tmp_path_factory.mktemp("store"), device="cpu", dtype="float32") as opened:
        yield opened


def compose(braid: Braid, mode: str) -> Context:
    rules = braid.register_system("You answer questions.")
    return braid.compose([rules, *braid.register_many(TEXTS)], mode=mode)


def continued(peer: Qwen3ForCausalLM, prompt_ids: tuple[int, ...], cache: DynamicCache | None) -> tuple[int, ...]:
    """64 greedy tokens of transformers."""
    ids = torch.tensor([prompt_ids])
    out = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=1019,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def test_generate_from_an_exact_context_equals_a_full_prefill(braid: Braid, peer: Qwen3ForCausalLM) -> None:
    context = compose(braid, "exact")
    prompt = context.prompt_ids(QUESTION)
    want = continued(peer, prompt, None)
    assert len(want) == 64
    cache = context.to_transformers_cache(peer.config)
    assert cache.get_seq_length() == len(context.input_ids)
    assert continued(peer, prompt, cache) == want
    assert cache.get_seq_length() > len(prompt), "generate has changed it"
    assert continued(peer, prompt, context.to_transformers_cache(peer.config)) == want, "a second one is fresh"
    assert continued(peer, prompt, context.to_transformers_cache()) == want, "the config may be left out"
    assert context.ask(QUESTION, max_new_tokens=64).token_ids == want, "our own entries are as they were"


@pytest.mark.parametrize("mode", ["anchored", "isolated"])
def test_generate_from_a_composed_context_equals_our_answer(braid: Braid, peer: Qwen3ForCausalLM, mode: str) -> None:
    context = compose(braid, mode)
    prompt = context.prompt_ids(QUESTION)
    answer = context.ask(QUESTION, max_new_tokens=64)
    assert answer.prompt_ids == prompt
    assert continued(peer, prompt, context.to_transformers_cache(peer.config)) == answer.token_ids
    assert answer.token_ids != continued(peer, prompt, None), "the test could tell it from a full prefill"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_a_plain_copy_in_the_models_dtype(random_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    with Braid(random_checkpoint, store=tmp_path / "store", device="cpu", dtype=dtype) as braid:
        context = compose(braid, "exact")
        cache = context.to_transformers_cache()
        for layer in cache.layers:
            for part in (layer.keys, layer.values):
                assert part.shape == (1, 2, len(context.input_ids), 32)
                assert part.dtype == braid.dtype
                part += 1.0  # no view of the pool, and no inference tensor
        again = context.to_transformers_cache()
        assert not torch.equal(again.layers[0].values, cache.layers[0].values)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
@torch.inference_mode()
def test_other_rotations_are_handed_over_once(
    make_checkpoint: Callable[..., Path], tmp_path: Path, rope: dict[str, object]
) -> None:
    """YaRN scales keys as it rotates them; a key that is moved is not scaled again. float32 sums in another order."""
    folder = make_checkpoint(rope_parameters=rope)
    peer = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with Braid(folder, store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        context = compose(braid, "exact")
        cache = context.to_transformers_cache()
    want = peer(torch.tensor([context.input_ids])).past_key_values
    for ours, theirs in zip(cache.layers, want.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4 * float(theirs.keys.abs().max()))
        assert torch.allclose(ours.values, theirs.values, rtol=1e-4, atol=1e-4 * float(theirs.values.abs().max()))


@torch.inference_mode()
def test_in_bfloat16_it_is_about_as_close_to_float32_as_transformers_own(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    """Values as close; keys up to the second rounding of a key that is moved to its place, by half an eps at most."""
    rounded = Qwen3ForCausalLM.from_pretrained(random_checkpoint, dtype=torch.bfloat16).eval()
    exact = Qwen3ForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()
    exact.load_state_dict({name: weight.float() for name, weight in rounded.state_dict().items()})
    with Braid(random_checkpoint, store=tmp_path / "store", device="cpu", dtype="bfloat16") as braid:
        context = compose(braid, "exact")
        ours = context.to_transformers_cache()
    ids = torch.tensor([context.input_ids])
    truth, theirs = (peer(ids).past_key_values for peer in (exact, rounded))

    def errors(cache: DynamicCache, part: str) -> torch.Tensor:
        pairs = zip(cache.layers, truth.layers, strict=True)
        return torch.stack([(getattr(a, part).float() - getattr(b, part)).square().mean().sqrt() for a, b in pairs])

    assert (errors(ours, "values") <= 1.1 * errors(theirs, "values")).all()
    assert (errors(ours, "keys") <= 1.5 * errors(theirs, "keys")).all()
