"""Reads Qwen3's config.json and generation_config.json, and refuses by name what is not computed."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from braidsdk.errors import UnsupportedModelError
from braidsdk.models.base import GenerationDefaults, ModelConfig, read_json

ROPE_TYPES = ("default", "linear", "yarn")
"""RoPE variants that rotate a key by its position only, so that a cached key can be relocated."""

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def read_config(folder: Path) -> tuple[ModelConfig, Qwen3Config]:
    """Read and check a checkpoint's configuration, generation_config.json included.

    Raises:
        UnsupportedModelError: it can't be read, or asks for something that is not computed here.
    """
    path = folder / "config.json"
    _refuse(path, _refused_by_name(read_json(path)))
    try:
        config = Qwen3Config.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for names, types and RoPE parameters
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise UnsupportedModelError(
            f"{path} must be a config that transformers can read; got: {reason}. Copy the checkpoint again."
        ) from error
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    stretched = 0
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        rope["factor"] = rope["factor"] or config.max_position_embeddings / original  # as transformers does without one
        stretched = int(rope["factor"] * original)
    q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    layer_types = sorted(set(config.layer_types or []) - {"full_attention"})
    refused = {
        f"layer_types {', '.join(layer_types)}": layer_types,
        f"{q_heads} query heads over {kv_heads} KV heads": q_heads % kv_heads,
    }
    _refuse(path, [name for name, is_set in refused.items() if is_set])
    generation, eos_ids = _generation(folder, config)
    return (
        ModelConfig(
            layers=config.num_hidden_layers,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            # Qwen3's own instructions for YaRN do not change max_position_embeddings.
            window=max(config.max_position_embeddings, stretched),
            rope=json.dumps({**rope, "head_dim": config.head_dim}, sort_keys=True),
            eos_ids=eos_ids,
            generation=generation,
        ),
        config,
    )


def rope_frequencies(config: Qwen3Config) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, float32 [head_dim / 2], and the factor on cosines and sines.

    The default is theta^(-2i / head_dim), as in transformers. For linear and YaRN (Peng et al. 2023, arXiv:2309.00071)
    transformers' own functions are called.
    """
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    if rope["rope_type"] != "default":
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return inv_freq, float(attention_factor)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def weight_shapes(config: Qwen3Config, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of this configuration, by its name in the checkpoint. A tied head is left out."""
    hidden, inter, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    q_size, kv_size = config.num_attention_heads * head_dim, kv_heads * head_dim
    projections = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), NORM: (hidden,)}
    for at in _layers(config):
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        for name, shape in projections.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = shape
            if config.attention_bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = shape[:1]
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inter, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inter)
    return shapes if tied else {**shapes, HEAD: (config.vocab_size, hidden)}


def switched_off(config: Qwen3Config) -> frozenset[str]:
    """Projection biases that transformers does not read under this configuration."""
    if config.attention_bias:
        return frozenset()
    return frozenset(f"{at}.self_attn.{name}_proj.bias" for at in _layers(config) for name in "qkvo")


def _layers(config: Qwen3Config) -> list[str]:
    return [f"model.layers.{index}" for index in range(config.num_hidden_layers)]


def _refused_by_name(raw: dict[str, Any]) -> list[str]:
    """What config.json asks for and is not computed here. Values that it leaves out are not filled in yet."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    by_layer = [name for name in rope if name.endswith("_attention")]
    partial = {rope.get("partial_rotary_factor"), raw.get("partial_rotary_factor")} - {None, 1.0}
    architectures = raw.get("architectures") or ["Qwen3ForCausalLM"]
    refused = {
        f"architecture {', '.join(map(repr, architectures))}": "Qwen3ForCausalLM" not in architectures,
        "its own code (auto_map)": "AutoModelForCausalLM" in (raw.get("auto_map") or {}),
        "another RoPE per layer type": by_layer,
        f"rope_type {rope_type!r}": rope_type not in ROPE_TYPES,
        "partial rotary embedding": partial,
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "quantised weights (quantization_config)": raw.get("quantization_config"),
    }
    return [name for name, is_set in refused.items() if is_set]


def _refuse(path: Path, names: list[str]) -> None:
    if names:
        raise UnsupportedModelError(
            f"{path} asks for {', '.join(names)}, which BraidSDK does not compute: cached keys could not be relocated, "
            "or would differ from the model's own. Use a plain Qwen3 checkpoint."
        )


def _generation(folder: Path, config: Qwen3Config) -> tuple[GenerationDefaults, frozenset[int]]:
    """The checkpoint's defaults for choosing tokens, and the ids that end an answer."""
    path = folder / "generation_config.json"
    found = {name: value for name, value in read_json(path).items() if value is not None} if path.is_file() else {}
    eos = found.get("eos_token_id", config.eos_token_id)
    ids = [eos] if isinstance(eos, int) else eos or []
    defaults = GenerationDefaults()
    chosen = {name: found.get(name, default) for name, default in vars(defaults).items()}
    ranges = {
        "top_p": (0.0, 1.0),
        "top_k": (0, math.inf),
        "repetition_penalty": (math.ulp(0.0), math.inf),  # above 0
        "min_p": (0.0, 1.0),
    }
    wrong = [
        f"{name} {chosen[name]!r}"
        for name, (low, high) in ranges.items()
        if isinstance(chosen[name], bool)
        or not isinstance(chosen[name], int | float)
        or not low <= chosen[name] <= high
        or math.isinf(chosen[name])
    ]
    if wrong or not all(type(each) is int for each in ids):
        what = ", ".join(wrong) or f"eos_token_id {eos!r}"
        raise UnsupportedModelError(
            f"Values in {path} must be numbers in range; got {what}. Correct the value, or remove the file."
        )
    return GenerationDefaults(**{**chosen, "top_k": int(chosen["top_k"])}), frozenset(ids)
