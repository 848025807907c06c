"""Hidden states to unrotated queries and appended KV, torch reference (order as in transformers' Qwen3Attention)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from braidsdk.kernels.blocks import in_blocks
from braidsdk.kernels.paging import append
from braidsdk.kernels.projection import project
from braidsdk.kernels.rms_norm.reference import rms_norm_reference
from braidsdk.kernels.rope import rotate


@dataclass(frozen=True)
class NormQKVWeights:
    """Packed weights of one layer.

    Attributes:
        norm: input layer norm, [hidden].
        qkv: query, key and value projections stacked in this order, [(q_heads + 2 * kv_heads) * head_dim, hidden].
        bias: their biases, or None.
        q_norm, k_norm: norms of each query's and key's head, [head_dim]; None in both for a model without them.
    """

    norm: Tensor
    qkv: Tensor
    bias: Tensor | None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def norm_qkv_reference(
    hidden: Tensor, weights: NormQKVWeights, eps: float, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor
) -> Tensor:
    """Project normed hidden states, append keys and values to the paged memory, return the queries.

    q_norm and k_norm, if there are any, are applied per head, before RoPE: per-dimension weights do not commute with a
    rotation. Keys are rotated in their segment's frame; queries stay unrotated, since each segment wants its own
    rotation.

    Args:
        hidden: [tokens, hidden].
        weights: the layer's packed weights.
        eps: of all norms.
        cos, sin: at the position of each token in its segment's frame, [tokens, head_dim / 2].
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim]; written in place.
        slots: where each token's key and value go, int64 [tokens]; a negative slot appends nothing (a padding row).

    Returns:
        Unrotated queries, normed if the model does that, [tokens, q_heads, head_dim].
    """
    kv_heads, head_dim = kv.shape[2], kv.shape[4]
    normed = in_blocks(lambda block: rms_norm_reference(block, weights.norm, eps), hidden)
    packed = project(normed, weights.qkv, weights.bias)
    packed = packed.view(len(hidden), -1, head_dim)
    queries, keys, values = torch.split(packed, [packed.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)

    def normed_head(heads: Tensor, norm: Tensor | None) -> Tensor:
        return heads if norm is None else rms_norm_reference(heads, norm, eps)

    def turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(normed_head(keys, weights.k_norm), cos, sin)

    _append(kv, slots, in_blocks(turned, keys, cos, sin), values)
    return (
        queries.contiguous()
        if weights.q_norm is None
        else in_blocks(partial(normed_head, norm=weights.q_norm), queries)
    )


def _append(kv: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """`paging.append`, without the rows whose slot is negative, and without a host synchronisation on CUDA."""
    if not slots.numel() or (slots.device.type == "cpu" and bool((slots >= 0).all())):
        append(kv, slots, keys, values)
        return
    # A padding row repeats what the first real row writes. With no real row, all write back what slot 0 holds.
    real = slots >= 0
    rows = torch.where(real, torch.arange(len(slots), device=slots.device), real.int().argmax())
    some, slots = real.any(), slots[rows].clamp(min=0)
    pages, offsets = slots // kv.shape[3], slots % kv.shape[3]
    held_keys, held_values = kv[:, pages, :, offsets].unbind(1)
    append(kv, slots, torch.where(some, keys[rows], held_keys), torch.where(some, values[rows], held_values))
