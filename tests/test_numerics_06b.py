"""Qwen3-0.6B's real geometry, once, with random weights and K-norm outliers: as close to the truth as transformers."""

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from braidsdk.cache.pool import Pool
from braidsdk.engine.batch import Run, forward, make_batch
from braidsdk.models.registry import load_model

CPU = torch.device("cpu")
NEEDED_GB = 12
"""The truth is 4.8 GB of float64 weights, beside the file's page cache."""

pytestmark = pytest.mark.skipif(
    psutil.virtual_memory().available < NEEDED_GB * 1e9, reason=f"needs {NEEDED_GB} GB of free memory"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("geometry")
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.uniform_(-0.035, 0.035, generator=generator)
        else:
            weight.data.fill_(0.3 if "q_norm" in name else 1.0)
    for index, layer in enumerate(
        model.model.layers[:16]
    ):  # as in the real one: 96.5 in layer 0, above 10 in 16 layers
        layer.self_attn.k_norm.weight.data[17 + index] = 96.5 if index == 0 else 11.0 + index
    model.save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()


def pieces(seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 151_000, (n,), generator=generator).tolist()) for n in (40, 65, 48)]


@torch.inference_mode()
def our_logits(folder: Path, dtype: torch.dtype) -> list[Tensor]:
    """Composed of three entries in frames of their own: logits of the last one's rows."""
    model = load_model(folder, device=CPU, dtype=dtype)
    found = []
    for seed in range(3):
        pool = Pool(layers=28, kv_heads=8, head_dim=128, dtype=dtype, device=CPU, capacity_bytes=1 << 30)
        runs, context, origin = [], [], 0
        for piece in pieces(seed):
            runs.append(Run(piece, tuple(context), pool.take(len(piece)), 0, origin))
            context.append(make_batch(runs[-1:], pool).requests[0].segments[-1])
            origin += len(piece)
        forward(model, pool, runs[:-1])
        rows = torch.arange(len(runs[-1].token_ids))
        found.append(model.forward(make_batch(runs[-1:], pool), pool.kv, rows).double())
    return found


@torch.inference_mode()
def their_logits(folder: Path) -> list[Tensor]:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompts = [torch.tensor([[i for piece in pieces(seed) for i in piece]]) for seed in range(3)]
    return [model(ids, logits_to_keep=48).logits[0].double() for ids in prompts]


def test_the_real_geometry_is_as_close_to_the_truth_as_transformers_is(checkpoint: Path) -> None:
    theirs = their_logits(checkpoint)
    ours = our_logits(checkpoint, torch.bfloat16)
    gc.collect()
    truth = our_logits(checkpoint, torch.float64)
    ratios = [float((a - t).norm() / (b - t).norm()) for a, b, t in zip(ours, theirs, truth, strict=True)]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert mean <= 1.05, ratios
    assert max(ratios) <= 1.10, ratios
