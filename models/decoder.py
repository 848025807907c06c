"""A dense decoder over paged KV memory: attention, MLP, layer, model. One serves all families, devices and backends."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from braidsdk.kernels.attention import Plan, cascade_attention, cascade_attention_lse, plan_attention
from braidsdk.kernels.backends import Backend, Backends, Geometry
from braidsdk.kernels.head import norm_head
from braidsdk.kernels.key_weights import plan_key_weights, weights_by_segment
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.projection import pack
from braidsdk.kernels.rope import RotaryTable
from braidsdk.kernels.shift import apply_shifts, plan_shifts
from braidsdk.kernels.swiglu import norm_swiglu
from braidsdk.kernels.weight import GROUP, Weight, quantised, whole
from braidsdk.models.base import Batch, ModelConfig, Step, only_rows
from braidsdk.models.config import EMBEDDING, HEAD, NORM, CheckpointConfig, switched_off, weight_shapes
from braidsdk.models.weights import Weights, WeightsWarning


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, stacked and laid out for its operations.

    Attributes:
        qkv: input norm, QKV projection, and QK norms if the family has them.
        out: attention's output projection, [hidden, q_heads * head_dim].
        out_bias: [hidden], or None.
        mlp_norm: [hidden].
        gate_up: gate and up projections stacked, [2 * intermediate, hidden].
        down: [hidden, intermediate].
    """

    qkv: NormQKVWeights
    out: Weight
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight


class Decoder:
    """A decoder of grouped-query attention, RoPE, RMSNorm and SwiGLU, computed as transformers computes its family."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        eps: float,
        rotary: RotaryTable,
        embedding: Tensor,
        layers: tuple[Layer, ...],
        norm: Tensor,
        head: Weight,
        fingerprint: str,
        backends: Backends,
        geometry: Geometry,
    ) -> None:
        """Put a model together from its parts. `load` reads them from a checkpoint.

        Args:
            config: its numbers.
            eps: epsilon of every RMSNorm.
            rotary: cosines and sines.
            embedding: [vocab_size, hidden].
            layers: in order.
            norm: final norm, [hidden].
            head: [vocab_size, hidden]. It is the embedding itself if they are tied.
            fingerprint: hash of the weights' content.
            backends: what computes each operation.
            geometry: what decided it.
        """
        self.config = config
        self.backends = backends
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._eps = eps
        self.rotary = rotary
        self.embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head

    @classmethod
    def load(
        cls,
        config: CheckpointConfig,
        weights: Weights,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        int8: bool = False,
        choose: Callable[[Geometry, torch.device], Backends],
    ) -> "Decoder":
        """Load a checkpoint strictly.

        Args:
            config: its configuration.
            weights: its weights.
            device: the device that it will run on.
            dtype: the dtype to compute in. None takes the one that its config names, or else the one that its weights
                are stored in. In both cases float32 replaces float16, which is not computed; float32 holds every
                float16 exactly.
            int8: keep the weights of products, the LM head among them, in 8-bit integers. Norms, biases, embeddings, KV
                cache and activations stay in `dtype`.
            choose: what computes each operation of such a model on this device. Asked before the weights are read, so
                that each is laid out once, as its backend reads it.

        Raises:
            WeightsError: weights are missing, unexpected, misshapen or not finite.
        """
        numbers = config.numbers
        tied = config.tied
        if tied and HEAD in weights and EMBEDDING in weights:
            tied = weights.drop_copy(HEAD, EMBEDDING)
            if not tied:
                warnings.warn(
                    f"{weights.path} ties its embeddings, but holds another {HEAD!r}. That one is used, as in "
                    "transformers. Set tie_word_embeddings to false in its config.json, or remove the weight.",
                    WeightsWarning,
                    stacklevel=4,
                )
        weights.expect(weight_shapes(config, tied=tied), unused=switched_off(config))
        if dtype is None:
            named = config.dtype or weights.stored_dtype(EMBEDDING)
            dtype = torch.float32 if named in (None, torch.float16) else named
        geometry = numbers.geometry(dtype, int8=int8)
        backends = choose(geometry, device)

        def take(*names: str) -> Tensor:
            return weights.take(names, dtype, device)

        def linear(backend: Backend, *names: str) -> Weight:
            if int8:  # read in float32 what is stored in another dtype: rounding twice would lose more
                exact = dtype if weights.stored_dtype(names[0]) == dtype else torch.float32
                return quantised(weights.take(names, exact, device, mapped=True))
            if backend == "torch":
                return pack(take(*names))
            return weights.take(names, dtype, device, mapped=backend == "native")

        def layer(index: int) -> Layer:
            at = f"model.layers.{index}"
            attention, mlp = f"{at}.self_attn", f"{at}.mlp"
            return Layer(
                qkv=NormQKVWeights(
                    norm=take(f"{at}.input_layernorm.weight"),
                    qkv=linear(backends.norm_qkv, *(f"{attention}.{name}_proj.weight" for name in "qkv")),
                    bias=take(*(f"{attention}.{name}_proj.bias" for name in "qkv")) if numbers.qkv_bias else None,
                    q_norm=take(f"{attention}.q_norm.weight") if numbers.qk_norm else None,
                    k_norm=take(f"{attention}.k_norm.weight") if numbers.qk_norm else None,
                ),
                out=linear(backends.out_proj, f"{attention}.o_proj.weight"),
                out_bias=take(f"{attention}.o_proj.bias") if config.out_bias else None,
                mlp_norm=take(f"{at}.post_attention_layernorm.weight"),
                gate_up=linear(backends.swiglu, *(f"{mlp}.{name}_proj.weight" for name in ("gate", "up"))),
                down=linear(backends.out_proj, f"{mlp}.down_proj.weight"),
            )

        embedding = whole(weights.take([EMBEDDING], dtype, device, mapped=True))
        layers = tuple(layer(index) for index in range(numbers.layers))
        shared = tied and not int8
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            numbers,
            eps=config.eps,
            rotary=RotaryTable(config.inv_freq, config.attention_factor, wide, device),
            embedding=embedding,
            layers=layers,
            norm=take(NORM),
            head=embedding if shared else linear(backends.head, EMBEDDING if tied else HEAD),
            fingerprint=_fingerprint(weights.finish(), config.eps, int8=int8),
            backends=backends,
            geometry=geometry,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Tensor, logit_rows: Tensor | None) -> Tensor | None:
        """Compute new tokens over paged memory; see `models.base.Model.forward`."""
        step = self.plan(batch, kv.shape[4])
        last = None
        if logit_rows is not None and self.device.type == "cpu" and len(logit_rows) < len(batch.token_ids):
            last = self.plan(only_rows(batch, logit_rows), kv.shape[4])
        return self.compute(self.embedding[batch.token_ids], batch.slots, step, kv, logit_rows, last)

    @torch.inference_mode()
    def compute(
        self,
        hidden: Tensor,
        slots: Tensor,
        step: Step,
        kv: Tensor,
        logit_rows: Tensor | slice | None,
        last: Step | None = None,
    ) -> Tensor | None:
        """`forward`, planned; see `models.base.Model.compute`."""
        for layer, memory in zip(self._layers, kv, strict=True):
            queries = self._qkv(layer, hidden, slots, step, memory)
            if layer is self._layers[-1] and logit_rows is None:
                return None  # the last layer's keys and values were all that was wanted
            if layer is self._layers[-1] and last:
                hidden, queries, step = hidden[logit_rows], queries[logit_rows], last
            hidden = self._finish_layer(layer, hidden, queries, step, memory)
        wanted = hidden if last else hidden[logit_rows]
        return norm_head(wanted, self._norm, self._head, self._eps, backend=self.backends.head)

    @torch.inference_mode()
    def forward_layer(self, index: int, hidden: Tensor, batch: Batch, memory: Tensor) -> Tensor:
        """Compute one layer alone; see `models.base.Model.forward_layer`."""
        layer, step = self._layers[index], self.plan(batch, memory.shape[3])
        return self._finish_layer(layer, hidden, self._qkv(layer, hidden, batch.slots, step, memory), step, memory)

    @torch.inference_mode()
    def attended(self, batch: Batch, kv: Tensor, layers: Sequence[int]) -> tuple[Tensor, ...]:
        """How much rows attend to each key; see `models.base.Model.attended`."""
        (request,), page_size = batch.requests, kv.shape[4]
        seen = plan_key_weights(
            batch.positions,
            request,
            self.rotary,
            backend=self.backends.attention,
            **self._geometry_of(batch, page_size),
        )
        cos, sin = self.rotary.at(batch.frame_positions, batch.limit)
        step = Step(cos, sin, seen.attention)
        hidden, found = self.embedding[batch.token_ids], []
        for index in range(max(layers) + 1):
            layer, memory = self._layers[index], kv[index]
            queries = self._qkv(layer, hidden, batch.slots, step, memory)
            if index in layers:
                attended, weights = seen.attend(queries, memory, self.config.head_dim**-0.5)
                found.append(weights)
            else:
                attended = cascade_attention(queries, step.plan, memory, self.config.head_dim**-0.5)
            if index < max(layers):
                hidden = self._after_attention(layer, hidden, attended)
        total = torch.stack(found).amax(1).sum(0)
        return weights_by_segment(total, request.segments, page_size)

    @torch.inference_mode()
    def fill(self, batch: Batch, kv: Tensor, layer: int) -> None:
        """Compute new tokens up to a layer's keys and values; see `models.base.Model.fill`."""
        hidden, step = self.embedding[batch.token_ids], self.plan(batch, kv.shape[4])
        for each, memory in zip(self._layers[: layer + 1], kv, strict=False):
            queries = self._qkv(each, hidden, batch.slots, step, memory)
            if each is not self._layers[layer]:
                hidden = self._finish_layer(each, hidden, queries, step, memory)

    @torch.inference_mode()
    def attention_shares(self, batch: Batch, kv: Tensor, layers: range) -> Tensor:
        """How the attention of tokens is spread over segments; see `models.base.Model.attention_shares`."""
        step, by_segment = self.plan(batch, kv.shape[4]), self._plan(batch, kv.shape[4], by_segment=True)
        nowhere, scale = torch.full_like(batch.slots, -1), self.config.head_dim**-0.5
        hidden, shares = self.embedding[batch.token_ids], []
        for index in range(layers.stop):
            layer, memory = self._layers[index], kv[index]
            queries = self._qkv(layer, hidden, nowhere, step, memory)
            if index in layers:
                attended, lse = cascade_attention_lse(queries, by_segment, memory, scale)
                shares.append(torch.softmax(lse, -1).mean(1))
            else:
                attended = cascade_attention(queries, step.plan, memory, scale)
            if index < layers[-1]:
                hidden = self._after_attention(layer, hidden, attended)
        return torch.stack(shares).mean(0)

    def plan(self, batch: Batch, page_size: int) -> Step:
        """What all layers of a forward pass share."""
        cos, sin = self.rotary.at(batch.frame_positions, batch.limit)
        shifts = plan_shifts(batch.shifts, self.rotary) if batch.shifts else None
        return Step(cos, sin, self._plan(batch, page_size), shifts)

    def _plan(self, batch: Batch, page_size: int, *, by_segment: bool = False) -> Plan:
        """The plan of the attention; `by_segment` for the log-sum-exp of each segment, which the C kernels don't
        give."""
        backend = self.backends.attention
        return plan_attention(
            batch.positions,
            batch.requests,
            self.rotary,
            backend="torch" if by_segment and backend == "native" else backend,
            by_segment=by_segment,
            **self._geometry_of(batch, page_size),
        )

    def _geometry_of(self, batch: Batch, page_size: int) -> dict[str, Any]:
        """What planners of attention ask about a pass besides its requests."""
        kv_heads = self.config.kv_heads
        return {
            "limit": batch.limit,
            "page_size": page_size,
            "group": self.config.q_heads // kv_heads,
            "kv_heads": kv_heads,
            "dtype": self.dtype,
        }

    def _qkv(self, layer: Layer, hidden: Tensor, slots: Tensor, step: Step, memory: Tensor) -> Tensor:
        """Compute the queries of new tokens, and write their keys and values to the memory."""
        backend = self.backends.norm_qkv
        queries = norm_qkv(hidden, layer.qkv, self._eps, step.cos, step.sin, memory, slots, backend=backend)
        if step.shifts:
            apply_shifts(memory, step.shifts, backend=backend)
        return queries

    def _finish_layer(self, layer: Layer, hidden: Tensor, queries: Tensor, step: Step, memory: Tensor) -> Tensor:
        """Compute attention, output projection and MLP, and add each to the residual: [tokens, hidden]."""
        attended = cascade_attention(queries, step.plan, memory, self.config.head_dim**-0.5)
        return self._after_attention(layer, hidden, attended)

    def _after_attention(self, layer: Layer, hidden: Tensor, attended: Tensor) -> Tensor:
        backends = self.backends
        hidden = out_proj(attended.flatten(1), layer.out, layer.out_bias, hidden, backend=backends.out_proj)
        mixed = norm_swiglu(hidden, layer.mlp_norm, layer.gate_up, self._eps, backend=backends.swiglu)
        return out_proj(mixed, layer.down, None, hidden, backend=backends.out_proj)


def _fingerprint(weights: str, eps: float, *, int8: bool) -> str:
    """Hash of everything that changes the function and is not in a tensor's name or shape, nor elsewhere in a key."""
    rounded = f" int8 in groups of {GROUP}" if int8 else ""
    return xxhash.xxh3_128_hexdigest(f"{weights} rms_norm_eps={eps!r}{rounded}".encode())
