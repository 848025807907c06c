"""Qwen3 over paged KV memory: attention, MLP, layer, model. One file for every device; `kernels` picks the path."""

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
from braidsdk.models.qwen3.config import inverse_frequencies, read_config
from braidsdk.models.weights import Weights


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
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> "Qwen3":
        """Load a checkpoint strictly; see `models.base.Model.load`."""
        config, source = read_config(folder)
        if dtype is None:
            dtype = source.dtype if isinstance(source.dtype, torch.dtype) else torch.float32
        weights = Weights(folder)
        hidden, inter = source.hidden_size, source.intermediate_size
        q_size, kv_size = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        biased = source.attention_bias

        def take(shapes: dict[str, tuple[int, ...]]) -> Tensor:
            return weights.take(shapes, dtype, device)

        def layer(index: int) -> Layer:
            at = f"model.layers.{index}"
            attention, mlp = f"{at}.self_attn", f"{at}.mlp"
            projections = {"q": q_size, "k": kv_size, "v": kv_size}
            return Layer(
                qkv=NormQKVWeights(
                    norm=take({f"{at}.input_layernorm.weight": (hidden,)}),
                    qkv=take({f"{attention}.{n}_proj.weight": (size, hidden) for n, size in projections.items()}),
                    bias=take({f"{attention}.{n}_proj.bias": (size,) for n, size in projections.items()})
                    if biased
                    else None,
                    q_norm=take({f"{attention}.q_norm.weight": (config.head_dim,)}),
                    k_norm=take({f"{attention}.k_norm.weight": (config.head_dim,)}),
                ),
                out=take({f"{attention}.o_proj.weight": (hidden, q_size)}),
                out_bias=take({f"{attention}.o_proj.bias": (hidden,)}) if biased else None,
                mlp_norm=take({f"{at}.post_attention_layernorm.weight": (hidden,)}),
                gate_up=take({f"{mlp}.{n}_proj.weight": (inter, hidden) for n in ("gate", "up")}),
                down=take({f"{mlp}.down_proj.weight": (hidden, inter)}),
            )

        embedding = take({"model.embed_tokens.weight": (config.vocab_size, hidden)})
        layers = tuple(layer(index) for index in range(config.layers))
        norm = take({"model.norm.weight": (hidden,)})
        tied = source.tie_word_embeddings
        head = embedding if tied else take({"lm_head.weight": (config.vocab_size, hidden)})
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            config,
            eps=source.rms_norm_eps,
            rotary=RotaryTable(inverse_frequencies(source), 1.0, wide, device),
            embedding=embedding,
            layers=layers,
            norm=norm,
            head=head,
            fingerprint=weights.finish(ignored=frozenset({"lm_head.weight"} if tied else ())),
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
