"""Hidden states to unrotated queries and appended KV, plainly (order as in transformers' Qwen3Attention)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.paging import append
from braidsdk.kernels.rms_norm.reference import rms_norm_reference
from braidsdk.kernels.rope import rotate
from braidsdk.kernels.weight import Weight, dense, in_one_piece


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
    qkv: Weight
    bias: Tensor | None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def norm_qkv_reference(
    hidden: Tensor, weights: NormQKVWeights, eps: float, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor
) -> Tensor:
    """What `op.norm_qkv` computes; arguments as there.

    q_norm and k_norm, if there are any, are applied per head, before RoPE: per-dimension weights do not commute with a
    rotation. Keys are rotated in their segment's frame; queries stay unrotated, since each segment wants its own
    rotation.
    """
    kv_heads, head_dim = kv.shape[2], kv.shape[4]
    weight = dense(in_one_piece(weights.qkv), hidden.dtype)
    projected = linear(rms_norm_reference(hidden, weights.norm, eps), weight, weights.bias)
    heads = projected.view(len(hidden), -1, head_dim)
    queries, keys, values = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if weights.q_norm is not None:
        queries = rms_norm_reference(queries, weights.q_norm, eps)
    if weights.k_norm is not None:
        keys = rms_norm_reference(keys, weights.k_norm, eps)
    real = slots >= 0
    append(kv, slots[real], rotate(keys, cos, sin)[real], values[real])
    return queries.contiguous()
