"""Checkpoints of Qwen3's geometries with random weights, and texts of an exact number of tokens."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from braidsdk.models.tiny import CHECKPOINT
from braidsdk.tokens import PromptLayout

_COMMON = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": None,
    "eos_token_id": 151_935,
}


def _geometry(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = True) -> dict[str, object]:
    return {
        **_COMMON,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


GEOMETRIES = {
    "0.6B": _geometry(1024, 3072, 28, 16),
    "1.7B": _geometry(2048, 6144, 28, 16),
    "4B": _geometry(2560, 9728, 36, 32),
    "8B": _geometry(4096, 12_288, 36, 32, tied=False),
}
"""Arguments of `transformers.Qwen3Config`."""


def save_checkpoint(folder: Path, geometry: str = "0.6B", device: str = "cpu") -> None:
    """A checkpoint of the geometry with random weights in bfloat16, made on `device`, and braid-tiny's tokenizer."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**GEOMETRIES[geometry], dtype="bfloat16")).to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1.0)
        else:
            weight.data.uniform_(-0.035, 0.035)  # the standard deviation of the usual 0.02
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, folder)


def text_of(layout: PromptLayout, tokens: int, seed: int) -> str:
    """A text that is exactly so many tokens as a chunk."""
    rng = random.Random(seed)
    return _exact(lambda text: len(layout.plain_ids(text)), tokens, [rng.choice(_WORDS) for _ in range(tokens)])


def question_of(layout: PromptLayout, tokens: int) -> str:
    """A question whose tail is exactly so many tokens."""
    return _exact(lambda text: len(layout.question_ids(text)), tokens, ["what", *["x"] * tokens])


_WORDS = ("the", "river", "city", "old", "queen", "rules", "north", "small", "kingdom", "mountain", "sea")


def _exact(count: Callable[[str], int], tokens: int, words: list[str]) -> str:
    """As many of the words as there is room for, and filling."""
    while (excess := count(" ".join(words)) - tokens) > 0:
        del words[-1 - excess // 4 :]
    text = " ".join(words)
    while (missing := tokens - count(text)) > 0:
        text = next(longer for end in (" a", "a", " x", "1") if 0 <= tokens - count(longer := text + end) < missing)
    return text
