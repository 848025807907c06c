"""What a checkpoint's config.json and generation_config.json say, and what is refused by name because it is not
computed. A `Family` says what differs between architectures.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from braidsdk.errors import UnsupportedModelError
from braidsdk.models.base import GenerationDefaults, ModelConfig, read_json
from braidsdk.models.fingerprints import libraries, recall, remember, stamp

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "yarn")
"""RoPE variants of every family. All variants that are computed rotate a key by its position only, so that a cached key
can be relocated."""

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Family:
    """What one architecture has of its own. The rest is `models.decoder`: a dense decoder with grouped-query attention,
    RoPE, RMSNorm and SwiGLU.

    Attributes:
        model_type, architecture: its names in config.json.
        config: the name of transformers' class that reads config.json. It is imported when a checkpoint is read: some
            of them bring a thousand modules.
        qk_norm: whether each head of queries and keys has an RMSNorm.
        qkv_bias, out_bias: whether the projections of attention have biases, by config.
        rope_types: RoPE variants.
        refused: names what a config asks for and is not computed, beside what no family computes.
    """

    model_type: str
    architecture: str
    config: str
    qk_norm: bool
    qkv_bias: Callable[[Any], bool]
    out_bias: Callable[[Any], bool]
    rope_types: tuple[str, ...] = ROPE_TYPES
    refused: Callable[[Any], list[str]] = lambda _: []

    @property
    def config_class(self) -> "type[PretrainedConfig]":
        """The class of that name."""
        found: type[PretrainedConfig] = getattr(import_module("transformers"), self.config)
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint's configuration.

    Attributes:
        numbers: what the rest of the SDK needs.
        dtype: what its weights are to be computed in; None if it does not say.
        eps: epsilon of every RMSNorm.
        tied: whether the head is the embedding.
        out_bias: whether attention's output projection has a bias.
        inv_freq: radians per position of each rotated pair, float32 [head_dim / 2].
        attention_factor: on cosines and sines.
    """

    numbers: ModelConfig
    dtype: torch.dtype | None
    eps: float
    tied: bool
    out_bias: bool
    inv_freq: Tensor
    attention_factor: float


def read_config(folder: Path, family: Family, remembered: Path | None = None) -> CheckpointConfig:
    """Read and check a checkpoint's configuration, generation_config.json included.

    Args:
        folder: the checkpoint's folder.
        family: its family.
        remembered: a file that remembers configurations that were read before. With them transformers is not imported,
            which takes half a second.

    Raises:
        UnsupportedModelError: it can't be read, or asks for something that is not computed here.
    """
    if remembered is None:
        return _read_config(folder, family)
    files = [path for name in ("config.json", "generation_config.json") if (path := folder / name).is_file()]
    files += [*libraries("transformers", "torch"), Path(__file__)]  # they make of it what is remembered
    key = stamp(files)
    if known := recall(remembered, key):
        return _from_json(known)
    found = _read_config(folder, family)
    remember(remembered, key, files, _to_json(found))
    return found


def _read_config(folder: Path, family: Family) -> CheckpointConfig:
    path = folder / "config.json"
    _refuse(path, family, _refused_by_name(read_json(path), family))
    found = checked(path, family, lambda: family.config_class.from_pretrained(folder))
    generation, eos_ids = _generation(folder, found.numbers.eos_ids)
    return replace(found, numbers=replace(found.numbers, generation=generation, eos_ids=eos_ids))


def _to_json(config: CheckpointConfig) -> dict[str, Any]:
    numbers = {**asdict(config.numbers), "eos_ids": sorted(config.numbers.eos_ids)}
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype else None
    return {**vars(config), "numbers": numbers, "dtype": dtype, "inv_freq": config.inv_freq.tolist()}


def _from_json(known: dict[str, Any]) -> CheckpointConfig:
    numbers = known["numbers"]
    generation, eos_ids = GenerationDefaults(**numbers["generation"]), frozenset(numbers["eos_ids"])
    return CheckpointConfig(
        **{
            **known,
            "numbers": ModelConfig(**{**numbers, "generation": generation, "eos_ids": eos_ids}),
            "dtype": getattr(torch, known["dtype"]) if known["dtype"] else None,
            "inv_freq": torch.tensor(known["inv_freq"], dtype=torch.float32),
        }
    )


def checked(path: Path, family: Family, read: Callable[[], Any]) -> CheckpointConfig:
    """The same of a config of transformers' class that `read` makes from what a file says.

    Raises:
        UnsupportedModelError: it can't be made, or asks for something that is not computed here.
    """
    try:
        config = read()
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        _refuse(path, family, _refused_as_read(config, rope, family))
        q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // q_heads
        stretched = 0
        if rope["rope_type"] == "yarn":
            original = rope["original_max_position_embeddings"]
            rope["factor"] = rope["factor"] or config.max_position_embeddings / original  # transformers' default
            stretched = int(rope["factor"] * original)
        inv_freq, attention_factor = _rope_frequencies(config, rope, head_dim)
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers raises many types for names, types and RoPE parameters
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise UnsupportedModelError(
            f"{path} must be a config that transformers can read; got: {reason}. Copy the checkpoint again."
        ) from error
    if q_heads % kv_heads:
        _refuse(path, family, [f"{q_heads} query heads over {kv_heads} KV heads"])
    return CheckpointConfig(
        numbers=ModelConfig(
            layers=config.num_hidden_layers,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            # Qwen's own instructions for YaRN do not change max_position_embeddings.
            window=max(config.max_position_embeddings, stretched),
            rope=json.dumps({**rope, "head_dim": head_dim}, sort_keys=True),
            eos_ids=_ids(path, config.eos_token_id),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias(config),
        ),
        dtype=config.dtype if isinstance(config.dtype, torch.dtype) else None,
        eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        out_bias=family.out_bias(config),
        inv_freq=inv_freq,
        attention_factor=attention_factor,
    )


def weight_shapes(config: CheckpointConfig, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of this configuration, by its name in the checkpoint. A tied head is left out."""
    numbers = config.numbers
    hidden, inter, head_dim = numbers.hidden_size, numbers.intermediate_size, numbers.head_dim
    q_size, kv_size = numbers.q_heads * head_dim, numbers.kv_heads * head_dim
    projections = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (numbers.vocab_size, hidden), NORM: (hidden,)}
    for at in _layers(config):
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        for name, shape in projections.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = shape
            if config.out_bias if name == "o" else numbers.qkv_bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = shape[:1]
        if numbers.qk_norm:
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inter, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inter)
    return shapes if tied else {**shapes, HEAD: (numbers.vocab_size, hidden)}


def switched_off(config: CheckpointConfig) -> frozenset[str]:
    """Biases of projections that transformers does not read under this configuration."""
    names = ("" if config.numbers.qkv_bias else "qkv") + ("" if config.out_bias else "o")
    return frozenset(f"{at}.self_attn.{name}_proj.bias" for at in _layers(config) for name in names)


def _layers(config: CheckpointConfig) -> list[str]:
    return [f"model.layers.{index}" for index in range(config.numbers.layers)]


def _rope_frequencies(config: "PretrainedConfig", rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """`inv_freq` and `attention_factor`. The default is theta^(-2i / head_dim), as in transformers. For linear, llama3
    and YaRN (Peng et al. 2023, arXiv:2309.00071) transformers' own functions are called."""
    if rope["rope_type"] != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return inv_freq, float(attention_factor)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def _refused_by_name(raw: dict[str, Any], family: Family) -> list[str]:
    """What config.json asks for and no family computes, or this one does not."""
    architectures = raw.get("architectures") or [family.architecture]
    auto_map, rope = raw.get("auto_map"), raw.get("rope_scaling") or raw.get("rope_parameters")
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    refused = {
        f"rope_type {rope_type!r}": rope_type not in family.rope_types,  # before transformers misses its parameters
        f"architecture {', '.join(map(repr, architectures))}": family.architecture not in architectures,
        "its own code (auto_map)": isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map,
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "quantised weights (quantization_config)": raw.get("quantization_config"),
    }
    return [name for name, is_set in refused.items() if is_set]


def _refused_as_read(config: Any, rope: dict[str, Any], family: Family) -> list[str]:
    """The same of what transformers makes of config.json: which of several places for RoPE counts is its decision."""
    rope_type, dtype = rope.get("rope_type"), config.dtype
    layer_types = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    refused = {
        "another RoPE per layer type": any(isinstance(value, dict) for value in rope.values()),
        f"rope_type {rope_type!r}": rope_type not in family.rope_types,
        "partial rotary embedding": rope.get("partial_rotary_factor") not in (None, 1.0),
        f"layer_types {', '.join(layer_types)}": layer_types,
        f"dtype {str(dtype).removeprefix('torch.')}": isinstance(dtype, torch.dtype) and dtype not in DTYPES,
    }
    return [*[name for name, is_set in refused.items() if is_set], *family.refused(config)]


def _refuse(path: Path, family: Family, names: list[str]) -> None:
    if names:
        raise UnsupportedModelError(
            f"{path} asks for {', '.join(names)}, which BraidSDK does not compute: cached keys could not be relocated, "
            f"or would differ from the model's own. Use a plain {family.architecture.removesuffix('ForCausalLM')} "
            "checkpoint."
        )


def _generation(folder: Path, eos_ids: frozenset[int]) -> tuple[GenerationDefaults, frozenset[int]]:
    """The checkpoint's defaults for choosing tokens, and the ids that end an answer: `eos_ids` unless it names some."""
    path = folder / "generation_config.json"
    found = {name: value for name, value in read_json(path).items() if value is not None} if path.is_file() else {}
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
    if wrong:
        raise _out_of_range(path, ", ".join(wrong))
    if "eos_token_id" in found:
        eos_ids = _ids(path, found["eos_token_id"])
    return GenerationDefaults(**{**chosen, "top_k": int(chosen["top_k"])}), eos_ids


def _ids(path: Path, eos: object) -> frozenset[int]:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(each) is int for each in ids):
        raise _out_of_range(path, f"eos_token_id {eos!r}")
    return frozenset(ids)


def _out_of_range(path: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Values in {path} must be numbers in range; got {what}. Correct the value, or remove the file."
    )
