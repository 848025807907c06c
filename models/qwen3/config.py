"""Qwen3's config.json: what we read of it, and what we refuse by name."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from braidsdk.errors import UnsupportedModelError
from braidsdk.models.base import ModelConfig


def read_config(folder: Path) -> tuple[ModelConfig, Qwen3Config]:
    """Read and check a checkpoint's configuration, generation_config.json included.

    Raises:
        UnsupportedModelError: it asks for something that is not computed here.
    """
    config = Qwen3Config.from_pretrained(folder)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    refused = {
        "layer_types with sliding attention": "sliding_attention" in (config.layer_types or []),
        f"rope_type {rope['rope_type']!r}": rope["rope_type"] != "default",
        "partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"hidden_act {config.hidden_act!r}": config.hidden_act != "silu",
        "quantised weights": getattr(config, "quantization_config", None) is not None,
    }
    if found := [name for name, is_set in refused.items() if is_set]:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} asks for {', '.join(found)}, which BraidSDK does not compute: cached keys could "
            "not be relocated, or would not equal the model's own."
        )
    generation = folder / "generation_config.json"
    eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    eos = config.eos_token_id if eos is None else eos
    return (
        ModelConfig(
            layers=config.num_hidden_layers,
            q_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            window=config.max_position_embeddings,
            rope=json.dumps({**rope, "head_dim": config.head_dim}, sort_keys=True),
            eos_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
        ),
        config,
    )


def inverse_frequencies(config: Qwen3Config) -> Tensor:
    """Radians per position of each rotated pair, float32 [head_dim / 2]: theta^(-2i / head_dim), as transformers."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    theta: float = dict(config.rope_parameters or {})["rope_theta"]
    return 1.0 / (theta**exponents)
