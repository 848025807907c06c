"""The interface of every model family: a configuration, a batch to compute, and a forward pass over paged KV memory.

Knows nothing about chunks, composition modes, stores or text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from braidsdk.errors import UnsupportedModelError
from braidsdk.kernels.attention import Plan
from braidsdk.kernels.backends import Backends, Geometry
from braidsdk.kernels.paging import Request, Shift
from braidsdk.kernels.rope import RotaryTable
from braidsdk.kernels.shift import Shifts


@dataclass(frozen=True)
class GenerationDefaults:
    """A checkpoint's defaults for choosing tokens (generation_config.json). Values that it leaves out are
    transformers'.

    The caller decides whether to sample at all, and at which temperature.

    Attributes:
        top_p: keeps the fewest most likely tokens that have this probability together; 1.0 keeps all.
        top_k: keeps this many of the most likely tokens; 0 keeps all.
        repetition_penalty: divides positive logits of tokens that are in the text already, and multiplies negative
            ones; 1.0 changes nothing.
        min_p: keeps tokens with at least this share of the likeliest token's probability; 0.0 keeps all.
    """

    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of one checkpoint that the rest of the SDK needs.

    Attributes:
        layers: number of decoder layers.
        q_heads: query heads per layer.
        kv_heads: key and value heads per layer.
        head_dim: size of one head.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        window: positions that the model was made for (`max_position_embeddings`), in tokens.
        rope: the whole RoPE configuration as canonical JSON. It is part of a KV entry's key.
        eos_ids: ids that end an answer.
        generation: how its tokens are chosen if the caller does not say.
        qk_norm: whether each head of queries and keys has an RMSNorm.
        qkv_bias: whether their projection, and that of the values, has biases.
    """

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    window: int
    rope: str
    eos_ids: frozenset[int]
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    qk_norm: bool = True
    qkv_bias: bool = False

    def geometry(self, dtype: torch.dtype, *, int8: bool = False) -> Geometry:
        """What decides which backends can compute such a model in this dtype, with weights in this dtype or in int8."""
        return Geometry(
            hidden=self.hidden_size,
            intermediate=self.intermediate_size,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab=self.vocab_size,
            dtype=str(dtype).removeprefix("torch."),
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            int8=int8,
        )


@dataclass(frozen=True)
class Batch:
    """New tokens to compute, and what their rows may see.

    Attributes:
        token_ids: int64 [tokens].
        positions: absolute positions, int64 [tokens].
        frame_positions: positions in the segment that each token's key is written to, int64 [tokens].
        slots: the slot to which each token's key and value are written, int64 [tokens].
        requests: rows and the segments that they see. Keys that this pass appends are visible in it.
        limit: a bound above every position and every `position - origin`. It is known without reading a tensor.
        shifts: computed in each layer once its keys and values are appended, before anything attends.
    """

    token_ids: Tensor
    positions: Tensor
    frame_positions: Tensor
    slots: Tensor
    requests: tuple[Request, ...]
    limit: int
    shifts: tuple[Shift, ...] = ()


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share.

    Attributes:
        cos, sin: cosines and sines for each new token in its segment's frame, [tokens, head_dim / 2].
        plan: the plan of the attention.
        shifts: those of the batch; None if it has none.
    """

    cos: Tensor
    sin: Tensor
    plan: Plan
    shifts: Shifts | None = None


def only_rows(batch: Batch, rows: Tensor) -> Batch:
    """The same pass for some of its tokens, with everything that they see.

    Args:
        batch: the pass.
        rows: indices of the tokens, int64 [rows], on the CPU, ascending.
    """
    requests, start = [], 0
    for request in batch.requests:
        count = int(((rows >= request.rows.start) & (rows < request.rows.stop)).sum())
        requests.append(Request(slice(start, start + count), request.segments))
        start += count
    return Batch(
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        frame_positions=batch.frame_positions[rows],
        slots=batch.slots[rows],
        requests=tuple(requests),
        limit=batch.limit,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a checkpoint's JSON files.

    Raises:
        UnsupportedModelError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} can't be read: {error}. Copy the checkpoint again.") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(
            f"{path} must hold a JSON object; got a {type(content).__name__}. Copy the checkpoint again."
        )
    return content


class Model(Protocol):
    """A decoder that reads and writes paged KV memory."""

    config: ModelConfig
    fingerprint: str
    """Hash of the weights' content, and of the numbers in the config that change the function and no shape. The content
    is names, dtypes, shapes and bytes as stored; how they are spread over files does not matter."""
    dtype: torch.dtype
    device: torch.device
    rotary: RotaryTable
    embedding: Tensor
    """The hidden state that each token starts with, [vocab_size, hidden]."""
    backends: Backends
    """What computes each operation."""
    geometry: Geometry
    """What decided it."""

    def forward(self, batch: Batch, kv: Tensor, logit_rows: Tensor | None) -> Tensor | None:
        """Compute new tokens: append their keys and values, and return logits for the rows that want them.

        Args:
            batch: the tokens.
            kv: paged memory of all layers, [layers, 2, pages, kv_heads, page_size, head_dim]; written in place.
            logit_rows: rows of the batch that want next-token logits, int64 [rows]; None for no logits.

        Returns:
            Logits [rows, vocab_size], float32 (float64 for a float64 model); None if `logit_rows` is None.
        """
        ...

    def forward_layer(self, index: int, hidden: Tensor, batch: Batch, memory: Tensor) -> Tensor:
        """Compute one layer alone, as `forward` does. It is for measuring layer by layer.

        Args:
            index: the layer's index.
            hidden: its input, [tokens, hidden].
            batch: the tokens of this input.
            memory: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim]; written in place.

        Returns:
            Its output, [tokens, hidden].
        """
        ...

    def attended(self, batch: Batch, kv: Tensor, layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Compute new tokens through some layers, and say how much they attend to each key that they see.

        Args:
            batch: the tokens, of one request. Their keys and values are appended, in the layers that are computed.
            kv: as in `forward`.
            layers: indices of the layers that count, at least one. None after the last of them is computed.

        Returns:
            For each segment of the request a score per token of its slice, [tokens], float32 (float64 for such a
            model): the greatest softmax weight that any head of any row gives it, summed over these layers.
        """
        ...

    def fill(self, batch: Batch, kv: Tensor, layer: int) -> None:
        """Compute new tokens as `forward` does, as far as the keys and values of one layer.

        Args:
            batch, kv: as in `forward`.
            layer: the last layer's index.
        """
        ...

    def attention_shares(self, batch: Batch, kv: Tensor, layers: range) -> Tensor:
        """How the attention of tokens is spread over the segments that they see. Appends nothing.

        The softmax weights of a segment's keys, summed over these, and their mean over the heads of these layers. It is
        made of each segment's log-sum-exp, so no weight of a single key is ever there.

        Args:
            batch: tokens whose keys and values are in the memory already. Its slots are not read.
            kv: as in `forward`; only read.
            layers: indices of the layers to look at, at least one. The layers after them are not computed.

        Returns:
            Shares that add up to 1 in each row, [tokens, segments], float32 (float64 for a float64 model); segments as
            many as the request with most of them has, 0.0 where a request has fewer.
        """
        ...

    def compute(
        self, hidden: Tensor, slots: Tensor, step: Step, kv: Tensor, logit_rows: Tensor | slice | None
    ) -> Tensor | None:
        """Do the same as `forward` with a plan that is made already. It uses only the device, so that a CUDA graph can
        capture it.

        Args:
            hidden: the tokens' embeddings, [tokens, hidden].
            slots: as in `Batch`. A token with a negative slot is computed and not appended.
            step: what the layers share.
            kv, logit_rows: as in `forward`; or the rows as a slice, which copies nothing.

        Returns:
            The same as `forward`.
        """
        ...
