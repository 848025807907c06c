"""Qwen3 over paged KV memory: attention, MLP, layer, model. One file for every device; `kernels` picks the path."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.attention import cascade_attention, plan_attention
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.rms_norm import rms_norm
from braidsdk.kernels.rope import RotaryTable
from braidsdk.kernels.swiglu import norm_swiglu
from braidsdk.models.base import Batch, ModelConfig
from braidsdk.models.qwen3.config import (
    EMBEDDING,
    HEAD,
    NORM,
    read_config,
    rope_frequencies,
    switched_off,
    weight_shapes,
)
from braidsdk.models.weights import Weights, WeightsWarning


@dataclass(frozen=True)
class Layer:
    """Packed weights of one decoder layer.

    Attributes:
        qkv: input norm, QKV projection and QK norms.
        out: attention's output projection, [hidden, q_heads * head_dim].
        out_bias: [hidden], or None.
        mlp_norm: [hidden].
        gate_up: gate and up projections stacked, [2 * intermediate, hidden].
        down: [hidden, intermediate].
    """

    qkv: NormQKVWeights
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Qwen3:
    """A Qwen3 decoder (Qwen team 2025, arXiv:2505.09388; computed as transformers' modeling_qwen3 does)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        eps: float,
        rotary: RotaryTable,
        embedding: Tensor,
        layers: tuple[Layer, ...],
        norm: Tensor,
        head: Tensor,
        fingerprint: str,
    ) -> None:
        """Put a model together from its parts; `load` reads them from a checkpoint.

        Args:
            config: its numbers.
            eps: of every RMSNorm.
            rotary: cosines and sines.
            embedding: [vocab_size, hidden].
            layers: in order.
            norm: final norm, [hidden].
            head: [vocab_size, hidden]; the embedding itself when tied.
            fingerprint: hash of the weights' content.
        """
        self.config = config
        self.fingerprint = fingerprint
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._eps = eps
        self._rotary = rotary
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None, memory: Path | None = None
    ) -> "Qwen3":
        """Load a checkpoint strictly; see `models.base.Model.load`."""
        config, source = read_config(folder)
        weights = Weights(folder, memory)
        tied = source.tie_word_embeddings
        if tied and HEAD in weights and EMBEDDING in weights:
            tied = weights.drop_copy(HEAD, EMBEDDING)
            if not tied:
                warnings.warn(
                    f"{folder} ties its embeddings and yet holds another {HEAD!r}: that one is used, as transformers "
                    "does. Set tie_word_embeddings to false in its config.json, or remove the weight.",
                    WeightsWarning,
                    stacklevel=4,
                )
        weights.expect(weight_shapes(source, tied=tied), unused=switched_off(source))
        if dtype is None:
            named = source.dtype if isinstance(source.dtype, torch.dtype) else weights.stored_dtype(EMBEDDING)
            dtype = torch.float32 if named in (None, torch.float16) else named

        def take(*names: str) -> Tensor:
            return weights.take(names, dtype, device)

        def layer(index: int) -> Layer:
            at = f"model.layers.{index}"
            attention, mlp = f"{at}.self_attn", f"{at}.mlp"
            biased = source.attention_bias
            return Layer(
                qkv=NormQKVWeights(
                    norm=take(f"{at}.input_layernorm.weight"),
                    qkv=take(*(f"{attention}.{name}_proj.weight" for name in "qkv")),
                    bias=take(*(f"{attention}.{name}_proj.bias" for name in "qkv")) if biased else None,
                    q_norm=take(f"{attention}.q_norm.weight"),
                    k_norm=take(f"{attention}.k_norm.weight"),
                ),
                out=take(f"{attention}.o_proj.weight"),
                out_bias=take(f"{attention}.o_proj.bias") if biased else None,
                mlp_norm=take(f"{at}.post_attention_layernorm.weight"),
                gate_up=take(*(f"{mlp}.{name}_proj.weight" for name in ("gate", "up"))),
                down=take(f"{mlp}.down_proj.weight"),
            )

        embedding = take(EMBEDDING)
        layers = tuple(layer(index) for index in range(config.layers))
        inv_freq, attention_factor = rope_frequencies(source)
        return cls(
            config,
            eps=source.rms_norm_eps,
            rotary=RotaryTable(inv_freq, attention_factor, torch.promote_types(dtype, torch.float32), device),
            embedding=embedding,
            layers=layers,
            norm=take(NORM),
            head=embedding if tied else take(HEAD),
            fingerprint=weights.finish(),
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Tensor, logit_rows: Tensor | None) -> Tensor | None:
        """Compute new tokens over paged memory; see `models.base.Model.forward`."""
        scale = self.config.head_dim**-0.5
        cos, sin = self._rotary.at(batch.frame_positions, batch.limit)
        plans = plan_attention(
            batch.positions,
            batch.requests,
            self._rotary,
            limit=batch.limit,
            page_size=kv.shape[4],
            group=self.config.q_heads // self.config.kv_heads,
            dtype=self.dtype,
        )
        hidden = self._embedding[batch.token_ids]
        for layer, memory in zip(self._layers, kv, strict=True):
            queries = norm_qkv(hidden, layer.qkv, self._eps, cos, sin, memory, batch.slots)
            if layer is self._layers[-1] and logit_rows is None:
                return None  # the last layer's keys and values were all that was wanted
            attended = cascade_attention(queries, plans, memory, scale)
            hidden = hidden + linear(attended.flatten(1), layer.out, layer.out_bias)
            hidden = hidden + linear(norm_swiglu(hidden, layer.mlp_norm, layer.gate_up, self._eps), layer.down)
        wanted = rms_norm(hidden[logit_rows], self._norm, self._eps)
        return linear(wanted, self._head).to(torch.promote_types(self.dtype, torch.float32))
