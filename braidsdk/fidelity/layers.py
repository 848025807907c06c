"""Compares our forward pass with transformers', layer by layer from the same inputs, to find a layer that is wrong.

The truth is transformers' own layer in float64. Its input is the output of transformers' layers before it, so no layer
is blamed for another.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from braidsdk.cache.pool import PAGE_SIZE, Pool
from braidsdk.engine.batch import Run, make_batch
from braidsdk.kernels.paging import PagedSegment
from braidsdk.models.base import Model


@dataclass(frozen=True)
class LayerOutputs:
    """One layer's outputs for one input, computed in three ways; each [tokens, hidden].

    Attributes:
        index: the layer's index.
        given: the input, in the model's dtype.
        truth: the output by transformers in float64.
        theirs: the output by transformers in the model's dtype.
        ours: the output by our model, on its own kernels.
    """

    index: int
    given: Tensor
    truth: Tensor
    theirs: Tensor
    ours: Tensor

    def relative_errors(self, got: Tensor) -> Tensor:
        """The error of `got`, one of the outputs, for each token: float64 [tokens].

        It is the norm of the difference from the truth over the norm of what the layer adds to its input. It is
        measured by token, because a few tokens can be thousands of times as large as the rest.
        """
        errors: Tensor = (got.double() - self.truth).norm(dim=-1) / (self.truth - self.given.double()).norm(dim=-1)
        return errors


@torch.inference_mode()
def compare_layers(
    ours: Model, theirs: nn.Module, pieces: Sequence[Sequence[int]], *, answer_tokens: int | None = None
) -> Iterator[LayerOutputs]:
    """Compute some text in every layer. Beside the two models, memory holds one layer in float64, and one layer's KV.

    Args:
        ours: a model.
        theirs: the same checkpoint by transformers, on the same device and in the same dtype.
        pieces: token ids of the text. Ours computes each piece in pages and a frame of its own, as it does chunks.
        answer_tokens: how many tokens at the end ours computes one by one, as in an answer. The tokens of the last
            piece before them are then one pass, as in a question, and all other pieces together are another. None
            computes everything in one pass.
    """
    decoder: Any = theirs.model
    page_size = PAGE_SIZE[ours.device.type]
    page_bytes = 2 * ours.config.kv_heads * page_size * ours.config.head_dim * ours.dtype.itemsize
    pool = Pool(
        layers=1,
        kv_heads=ours.config.kv_heads,
        head_dim=ours.config.head_dim,
        dtype=ours.dtype,
        device=ours.device,
        capacity_bytes=page_bytes * sum(-(-len(piece) // page_size) for piece in pieces),
    )
    runs = runs_in_frames(pool, pieces)
    passes = [runs] if answer_tokens is None else _passes(runs, answer_tokens)
    batches = [make_batch(each, pool) for each in passes if each]
    positions = torch.arange(sum(map(len, pieces)), device=ours.device)[None]
    hidden = decoder.embed_tokens(torch.tensor([[i for piece in pieces for i in piece]], device=ours.device))
    angles = decoder.rotary_emb(hidden, positions)
    true_angles = in_float64(decoder.rotary_emb)(hidden, positions)
    for index, layer in enumerate(decoder.layers):
        given = hidden[0]
        hidden = layer(given[None], position_embeddings=angles, attention_mask=None)
        truth = in_float64(layer)(given[None].double(), position_embeddings=true_angles, attention_mask=None)
        parts, row = [], 0
        for batch in batches:
            rows = slice(row, row + len(batch.token_ids))
            parts.append(ours.forward_layer(index, given[rows], batch, pool.kv[0]))
            row = rows.stop
        yield LayerOutputs(index, given, truth[0], hidden[0], torch.cat(parts))


def runs_in_frames(pool: Pool, pieces: Sequence[Sequence[int]]) -> list[Run]:
    """Put each piece in pages and a frame of its own. Each sees all pieces before it."""
    runs: list[Run] = []
    context: tuple[PagedSegment, ...] = ()
    origin = 0
    for piece in pieces:
        pages = pool.take(len(piece))
        pool.clear(pages)
        runs.append(Run(tuple(piece), context, pages, 0, origin))
        context = (*context, PagedSegment(pages, 0, len(piece), origin))
        origin += len(piece)
    return runs


def _passes(runs: list[Run], answer_tokens: int) -> list[list[Run]]:
    *documents, tail = runs
    end = len(tail.token_ids) - answer_tokens
    answer = [[replace(tail, token_ids=(each,), start=end + at)] for at, each in enumerate(tail.token_ids[end:])]
    return [documents, [replace(tail, token_ids=tail.token_ids[:end])] if end else [], *answer]


class _Norm(nn.Module):
    """transformers' RMSNorm, without the conversion to float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps))


class _Angles(nn.Module):
    """transformers' rotary embedding, without the conversion to float32."""

    def __init__(self, inv_freq: Tensor, scaling: float) -> None:
        super().__init__()
        self.inv_freq, self.scaling = inv_freq, scaling

    def forward(self, _hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        turns = positions[..., None].double() * self.inv_freq
        both = torch.cat((turns, turns), dim=-1)
        return both.cos() * self.scaling, both.sin() * self.scaling


def in_float64(module: nn.Module) -> nn.Module:
    """A copy of one of transformers' modules that computes everything in float64. `.double()` alone leaves norms and
    angles in float32."""
    lifted = copy.deepcopy(module).double()
    if replaced := _in_float64(lifted):
        return replaced
    for name, child in list(lifted.named_modules()):
        if replaced := _in_float64(child):
            lifted.set_submodule(name, replaced)
    return lifted


def _in_float64(module: Any) -> nn.Module | None:
    """The float64 replacement of a module that always computes in float32; None for other modules."""
    if hasattr(module, "variance_epsilon"):
        return _Norm(module.weight, module.variance_epsilon)
    if hasattr(module, "inv_freq"):
        return _Angles(module.inv_freq, module.attention_scaling)
    return None
