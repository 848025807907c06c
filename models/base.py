"""What every model family offers: a configuration, a batch to compute, and a forward pass over paged KV memory.

Knows nothing about chunks, composition modes, stores or text.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from braidsdk.errors import UnsupportedModelError
from braidsdk.kernels.attention import AttentionPlans
from braidsdk.kernels.paging import Request
from braidsdk.kernels.paths import Paths
from braidsdk.kernels.rope import RotaryTable


@dataclass(frozen=True)
class GenerationDefaults:
    """How a checkpoint wants its tokens chosen (generation_config.json); what it leaves out is as in transformers.

    Whether to draw at all, and at which temperature, is the caller's choice.

    Attributes:
        top_p: keep the fewest most likely tokens whose probabilities reach this sum; 1.0 keeps all.
        top_k: keep that many most likely tokens; 0 keeps all.
        repetition_penalty: divides positive logits of tokens already in the text, and multiplies negative ones; 1.0 is
            off.
        min_p: keep tokens at least that share of the likeliest one's probability; 0.0 keeps all.
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
        rope: the whole RoPE configuration as canonical JSON; part of a KV entry's key.
        eos_ids: ids that end an answer.
        generation: how its tokens are chosen where the caller does not say.
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


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share.

    Attributes:
        cos, sin: of each new token in its segment's frame, [tokens, head_dim / 2].
        plans: of the attention.
    """

    cos: Tensor
    sin: Tensor
    plans: AttentionPlans


def only_rows(batch: Batch, rows: Tensor) -> Batch:
    """The same pass for some of its tokens, with all that these see.

    Args:
        batch: the pass.
        rows: which of its tokens, int64 [rows], on the CPU, ascending.
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
    """One of a checkpoint's JSON files.

    Raises:
        UnsupportedModelError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} can't be read: {error}. Copy the checkpoint again.") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path} holds no JSON object. Copy the checkpoint again.")
    return content


class Model(Protocol):
    """A decoder that reads and writes paged KV memory."""

    config: ModelConfig
    fingerprint: str
    """Hash of the weights' content (names, dtypes, shapes and bytes as stored, whatever files they lie in) and of the
    numbers in the config that change the function and no shape."""
    dtype: torch.dtype
    device: torch.device
    rotary: RotaryTable
    paths: Paths
    """Which implementation each operation takes; may be changed between passes."""

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None, fingerprints: Path | None = None
    ) -> "Model":
        """Load a checkpoint strictly.

        Args:
            folder: the checkpoint.
            device: where it will run.
            dtype: what it is computed in; None is what its config names, or without that what its weights are stored
                in. Either way float32 stands for float16, which is not computed: it holds every float16 exactly.
            fingerprints: file that remembers fingerprints of checkpoints read before; None hashes all anew.

        Raises:
            UnsupportedModelError: the config asks for something that is not computed.
            WeightsError: weights are missing, unexpected, misshapen or not finite.
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

    def forward_layer(self, index: int, hidden: Tensor, batch: Batch, memory: Tensor) -> Tensor:
        """One layer by itself: what `forward` does between two layers. For measuring, layer by layer.

        Args:
            index: which layer.
            hidden: its input, [tokens, hidden].
            batch: the tokens that these are.
            memory: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim]; written in place.

        Returns:
            Its output, [tokens, hidden].
        """
        ...

    def compute(
        self, token_ids: Tensor, slots: Tensor, step: Step, kv: Tensor, logit_rows: Tensor | None
    ) -> Tensor | None:
        """`forward` with its plan made: touches the device alone, so that it can be captured in a CUDA graph.

        Args:
            token_ids, slots: as in `Batch`; a token with a negative slot is computed and not appended.
            step: what the layers share.
            kv, logit_rows: as in `forward`.

        Returns:
            What `forward` does.
        """
        ...
