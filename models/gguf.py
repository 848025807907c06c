"""Reads a GGUF file: its config and weights as `models.decoder` wants them. Quantised weights are dequantised.

The format and its names are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf`
reads it.
"""

import json
import re
import struct
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from braidsdk.errors import ModelError, UnsupportedModelError, WeightsError
from braidsdk.models.config import EMBEDDING, HEAD, NORM, CheckpointConfig, Family, checked
from braidsdk.models.fingerprints import recall, stamp
from braidsdk.models.weights import Stored, Weights

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX = ".gguf"

FACTORS = "rope_freqs.weight"
"""A divisor for each of RoPE's frequencies, where a model scales them (Llama 3.1 and later)."""

PIECE_ELEMENTS = 1 << 15
"""This many values are dequantised at a time. They stay in a core's cache, and torch does not wake its threads."""

LONG = 4096
"""Arrays of the metadata with so many items are a vocabulary's. Those with an item per layer are shorter."""

_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": NORM, "output.weight": HEAD}
_OTHER = (
    *("attention.scale", "attention.clamp_kqv", "attn_logit_softcapping", "final_logit_softcapping"),
    *("embedding_scale", "residual_scale", "logit_scale", "rope.scaling.attn_factor", "rope.scaling.alpha"),
    *(
        f"rope.scaling.yarn_{name}"
        for name in ("log_multiplier", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
    ),
)
"""Values that change the function and that these architectures do without."""

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """One GGUF file of one model.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file says about itself, and no weight.

        Raises:
            ModelError: the package `gguf` is not installed.
            UnsupportedModelError: it is no GGUF file, or only a part of one.
        """
        if find_spec("gguf") is None:
            raise ModelError(f"{path} needs the package gguf. Install it: pip install 'braidsdk[gguf]'.")
        self.path = path
        try:
            self._reader = _reader(path)
        except Exception as error:  # of several types: no magic number, a wrong version, an end too early
            raise UnsupportedModelError(
                f"{path} must be a GGUF file; it can't be read: {str(error)[:200]}. Copy the file again."
            ) from error
        if self.value("split.count", 1) != 1:
            raise UnsupportedModelError(
                f"{path} must hold a whole model; it is one of {self.value('split.count')} parts. Merge them: "
                "llama-gguf-split --merge."
            )

    @property
    def architecture(self) -> str:
        """The name of its architecture, such as "llama"."""
        return str(self.value("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the file's metadata."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    @cached_property
    def tensors(self) -> dict[str, "ReaderTensor"]:
        """Its tensors by the names in the file."""
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def config(self, family: Family) -> CheckpointConfig:
        """Its configuration.

        Raises:
            UnsupportedModelError: it asks for something that is not computed.
        """
        found = checked(self.path, family, lambda: family.config_class(**self._numbers()))
        if FACTORS not in self.tensors:
            return found
        factors = torch.from_numpy(np.array(self.tensors[FACTORS].data, dtype=np.float32)).view(-1)
        if factors.shape != found.inv_freq.shape or not bool((factors.isfinite() & (factors > 0)).all()):
            raise UnsupportedModelError(
                f"{FACTORS} in {self.path} must be {len(found.inv_freq)} numbers above 0; got others. Copy the file "
                "again."
            )
        digest = xxhash.xxh3_64_hexdigest(factors.numpy().tobytes())
        rope = json.dumps({**json.loads(found.numbers.rope), "factors": digest}, sort_keys=True)
        return replace(found, numbers=replace(found.numbers, rope=rope), inv_freq=found.inv_freq / factors)

    def _numbers(self) -> dict[str, Any]:
        """Its metadata under transformers' names.

        Raises:
            UnsupportedModelError: it asks for something that is not computed.
        """

        def own(key: str, default: Any = None) -> Any:
            return self.value(f"{self.architecture}.{key}", default)

        hidden, q_heads = own("embedding_length"), own("attention.head_count")
        head_dim = own("attention.key_length", hidden // q_heads)
        refused = {
            "experts": own("expert_count"),
            "a sliding window": own("attention.sliding_window"),
            "values of another size than keys": own("attention.value_length", head_dim) != head_dim,
            "partial rotary embedding": own("rope.dimension_count", head_dim) != head_dim,
            **{key: own(key) not in (None, 1) for key in _OTHER},
        }
        if names := [name for name, is_set in refused.items() if is_set]:
            raise UnsupportedModelError(
                f"{self.path} asks for {', '.join(names)}, which BraidSDK does not compute. Use a plain dense model."
            )
        rope = {"rope_type": own("rope.scaling.type", "none").replace("none", "default")}
        if factor := own("rope.scaling.factor"):
            rope["factor"] = factor
        if original := own("rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = original
        return {
            "max_position_embeddings": own("context_length"),
            "num_hidden_layers": own("block_count"),
            "hidden_size": hidden,
            "intermediate_size": own("feed_forward_length"),
            "num_attention_heads": q_heads,
            "num_key_value_heads": own("attention.head_count_kv", q_heads),
            "head_dim": head_dim,
            "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {**rope, "rope_theta": own("rope.freq_base", 10_000.0)},
            "vocab_size": int(self.tensors["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "eos_token_id": [
                value for key in ("eos", "eot") if (value := self.value(f"tokenizer.ggml.{key}_token_id")) is not None
            ],
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
        }


def _reader(path: Path) -> "GGUFReader":
    """The package's reader, which passes over long arrays. It takes apart each item of a vocabulary, which takes
    seconds, and nothing here asks for one."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":  # "I" is this machine's order
                return super()._get_field_parts(orig_offs, raw_type)
            data = self.data.data
            kind, count = struct.unpack_from("=IQ", data, orig_offs)
            if count < LONG:
                return super()._get_field_parts(orig_offs, raw_type)
            end = orig_offs + 12
            if kind == GGUFValueType.STRING:
                for _ in range(count):
                    end += 8 + struct.unpack_from("=Q", data, end)[0]
            elif kind in self.gguf_scalar_to_np:
                end += count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return end - orig_offs, [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]

    return Reader(path)


class GGUFWeights(Weights):
    """`Weights` of a GGUF file: under the names of a checkpoint, dequantised as they are taken."""

    def __init__(self, file: GGUFFile, config: CheckpointConfig, fingerprints: Path | None = None) -> None:
        """Args:
        file: the file.
        config: its configuration.
        fingerprints: as in `Weights`.
        """
        self.path = file.path
        self._remembered = fingerprints
        self._files = [file.path]
        self._heads = {"q_proj": config.numbers.q_heads, "k_proj": config.numbers.kv_heads}
        self._interleaved = file.architecture == "llama"
        self._tensors = {_name(name): tensor for name, tensor in file.tensors.items() if name != FACTORS}
        self._stored = {
            name: Stored(
                path=file.path,
                code=tensor.tensor_type.name,
                shape=tuple(int(size) for size in reversed(tensor.shape)),
                start=int(tensor.data_offset),
                nbytes=int(tensor.n_bytes),
            )
            for name, tensor in self._tensors.items()
        }
        self._stamp = stamp(self._files)
        self._known = recall(fingerprints, self._stamp) if fingerprints else None
        self._maps, self._digests, self._not_finite, self._absurd = {}, {}, [], []

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype that a weight is stored in; bfloat16 for one that is quantised. None if it is not there."""
        return super().stored_dtype(name) or (torch.bfloat16 if name in self else None)

    def _reads(self, _code: str) -> bool:
        return True  # the package gguf says what it can't dequantise

    def _is_mappable(self, name: str, dtype: torch.dtype, device: torch.device) -> bool:
        return not self._pairs(name) and super()._is_mappable(name, dtype, device)

    def _inspect(self, name: str, values: Tensor) -> None:
        self._digests[name] = self._digest(name)
        low, high = torch.aminmax(values)
        self._judge(name, float(torch.maximum(-low, high)), values.dtype)

    def _pairs(self, name: str) -> int:
        """The heads of a weight that llama.cpp stores with RoPE's pairs as neighbours, where transformers pairs the
        halves of a head. 0 for a weight that both store alike."""
        return self._heads.get(name.split(".")[-2], 0) if self._interleaved else 0

    def _digest(self, name: str) -> str:
        stored = self._stored[name]
        kind = f"{name} {stored.code} {list(stored.shape)}".encode()
        return xxhash.xxh3_128_hexdigest(kind + xxhash.xxh3_128_digest(_bytes(self._tensors[name]).data))

    def _read(self, name: str, target: Tensor) -> None:
        """Fill `target`, which is flat, with a weight, dequantised in pieces of whole blocks."""
        from gguf import GGML_QUANT_SIZES, dequantize

        stored, kind = self._stored[name], self._tensors[name].tensor_type
        heads = self._pairs(name)
        straight = torch.empty(target.shape) if heads else target
        elements, nbytes = GGML_QUANT_SIZES[kind]
        blocks = _bytes(self._tensors[name]).reshape(-1, nbytes)
        step = max(1, PIECE_ELEMENTS // elements)
        largest = torch.zeros(())
        for start, piece in zip(range(0, len(blocks), step), straight.split(step * elements), strict=True):
            try:
                values = np.array(dequantize(blocks[start : start + step].reshape(-1), kind), dtype=np.float32)
            except Exception as error:
                raise WeightsError(
                    f"{self.path} stores {name!r} as {stored.code}, which the package gguf can't dequantise: "
                    f"{str(error)[:200]}. Install a newer one, or use a file of another quantisation."
                ) from error
            piece.copy_(torch.from_numpy(values))
            if not self._known:
                low, high = torch.aminmax(torch.from_numpy(values))
                largest = torch.maximum(largest, torch.maximum(-low, high))  # NaN stays NaN
        if heads:
            whole = straight.view(heads, -1, 2, *stored.shape[1:])
            target.view(heads, 2, -1, *stored.shape[1:]).copy_(whole.transpose(1, 2))
        if not self._known:
            self._digests[name] = self._digest(name)
            self._judge(name, float(largest), target.dtype)


def _bytes(tensor: "ReaderTensor") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """A tensor's bytes in the file, flat. numpy computes with the file's own type, a memmap, many times slower."""
    return tensor.data.view(np.ndarray).reshape(-1).view(np.uint8)


def _name(name: str) -> str:
    """A tensor's name in a checkpoint; its own if it has none there."""
    if (found := _LAYER.fullmatch(name)) and found[2] in _IN_LAYER:
        return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.{found[3]}"
    return _NAMES.get(name, name)
