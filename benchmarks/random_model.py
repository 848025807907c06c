"""Checkpoints of Qwen3's geometries with random weights, and texts of an exact number of tokens."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from braidsdk import Braid, Context
from braidsdk.models.tiny import CHECKPOINT

_EOS = 151_935

_COMMON = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": None,
    "eos_token_id": _EOS,
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
    "0.6B, 4 layers": _geometry(1024, 3072, 4, 16),
    "1.7B": _geometry(2048, 6144, 28, 16),
    "4B": _geometry(2560, 9728, 36, 32),
    "8B": _geometry(4096, 12_288, 36, 32, tied=False),
}
"""Arguments of `transformers.Qwen3Config`."""


def token_bytes(geometry: str) -> int:
    """KV of one token in bfloat16."""
    shape = GEOMETRIES[geometry]
    layers, kv_heads, head_dim = (int(shape[name]) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    return layers * 2 * kv_heads * head_dim * 2


def save_checkpoint(folder: Path, geometry: str = "0.6B", device: str = "cpu", *, telling: bool = False) -> None:
    """A checkpoint of the geometry with random weights in bfloat16, and braid-tiny's tokenizer.

    No greedy answer ends early: the logit of the id that would end it is 0, far below the greatest.

    Args:
        folder: where it goes.
        geometry: a key of `GEOMETRIES`.
        device: where it is made.
        telling: let answers depend on what is asked, where plain random weights repeat one id whatever the prompt is,
            and let nearly every id decode to a text of its own, where braid-tiny's tokenizer knows 1,024 of them only
            and a stream of random ids shows hardly a piece of text. Costs the same time.
    """
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
    if telling:
        _tell(model)
    model.get_output_embeddings().weight.data[_EOS] = 0.0
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, folder)
    if telling:
        _show_every_id(folder / "tokenizer.json")


def _tell(model: Qwen3ForCausalLM) -> None:
    """Make the next token a function of the last one and of the context that a wrong context or row would change."""
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.fill_(2.0)  # attention picks some tokens instead of averaging all
    model.model.embed_tokens.weight.data *= 25.0  # else what all tokens have in common outweighs each token
    signs = torch.randint(0, 2, model.model.norm.weight.shape, device=model.device) * 2 - 1
    model.model.norm.weight.data.copy_(signs)  # else a tied head finds the last token likeliest again


def _show_every_id(tokenizer: Path) -> None:
    """Name the ids that a tokenizer does not know. No merge leads to them, so encoding stays as it was."""
    spec = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"]
    known = {*vocabulary.values(), *(token["id"] for token in spec["added_tokens"])}
    vocabulary |= {f"\u0120{number}": number for number in range(_EOS + 1) if number not in known}  # U+0120: a space
    tokenizer.write_text(json.dumps(spec), encoding="utf-8")


def text_of(braid: Braid, tokens: int, seed: int) -> str:
    """A text that is exactly so many tokens as a chunk."""
    rng = random.Random(seed)
    return _exact(braid.count_tokens, tokens, [rng.choice(_WORDS) for _ in range(tokens)])


def question_of(context: Context, tokens: int, seed: int | None = None) -> str:
    """A question whose tail is exactly so many tokens; one of its own for a seed."""
    rng = random.Random(seed)
    words = ["x" if seed is None else rng.choice(_WORDS) for _ in range(tokens)]

    def tail_tokens(question: str) -> int:
        return len(context.prompt_ids(question)) - len(context.input_ids)

    return _exact(tail_tokens, tokens, ["what", *words])


_WORDS = ("the", "river", "city", "old", "queen", "rules", "north", "small", "kingdom", "mountain", "sea")


def _exact(count: Callable[[str], int], tokens: int, words: list[str]) -> str:
    """As many of the words as there is room for, and filling."""
    while (excess := count(" ".join(words)) - tokens) > 0:
        del words[-1 - excess // 4 :]
    text = " ".join(words)
    while (missing := tokens - count(text)) > 0:
        text = next(longer for end in (" a", "a", " x", "1") if 0 <= tokens - count(longer := text + end) < missing)
    return text
