"""What every model family offers: a configuration, a batch to compute, and a forward pass over paged KV memory.

Knows nothing about chunks, composition modes, stores or text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from braidsdk.kernels.paging import Request


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of one checkpoint that the rest of the SDK needs.

    Attributes:
        layers: number of decoder layers.
        q_heads: query heads per layer.
        kv_heads: key and value heads per layer.
        head_dim: size of one head.
        vocab_size: rows of the embedding.
        window: positions that the model was made for (`max_position_embeddings`), in tokens.
        rope: the whole RoPE configuration as canonical JSON; part of a KV entry's key.
        eos_ids: ids that end an answer.
    """

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    window: int
    rope: str
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class Batch:
    """New tokens to compute and what their rows may see.

    Attributes:
        token_ids: int64 [tokens].
        positions: absolute positions, int64 [tokens].
        frame_positions: positions in the segment that each token's key is written to, int64 [tokens].
        slots: where each token's key and value are written, int64 [tokens].
        requests: rows and the segments that they see; keys appended in this pass are visible in it.
        limit: a bound that every position and every `position - origin` is below, known without reading a tensor.
    """

    token_ids: Tensor
    positions: Tensor
    frame_positions: Tensor
    slots: Tensor
    requests: tuple[Request, ...]
    limit: int


class Model(Protocol):
    """A decoder that reads and writes paged KV memory."""

    config: ModelConfig
    fingerprint: str
    """Hash of the weights' content: names, dtypes, shapes and bytes as stored, whatever files they lie in."""
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> "Model":
        """Load a checkpoint strictly; a dtype of None is the one that its config names.

        Raises:
            UnsupportedModelError: the config asks for something that is not computed.
            WeightsError: weights are missing, unexpected or misshapen.
        """
        ...

    def forward(self, batch: Batch, kv: Tensor, logit_rows: Tensor | None) -> Tensor | None:
        """Compute new tokens: append their keys and values, and give logits where asked.

        Args:
            batch: the tokens.
            kv: paged memory of all layers, [layers, 2, pages, kv_heads, page_size, head_dim]; written in place.
            logit_rows: rows of the batch whose next-token logits are wanted, int64 [rows]; None for no logits.

        Returns:
            Logits [rows, vocab_size], float32 (float64 for a float64 model); None if `logit_rows` is None.
        """
        ...
