"""RMSNorm, QKV projection, QK-norm, RoPE and KV append by torch, fast: in blocks, and over packed weights."""

from functools import partial

import torch
from torch import Tensor

from braidsdk.kernels.blocks import in_blocks
from braidsdk.kernels.norm_qkv.reference import NormQKVWeights
from braidsdk.kernels.paging import append
from braidsdk.kernels.projection import project
from braidsdk.kernels.rms_norm.reference import rms_norm_reference
from braidsdk.kernels.rope import rotate
from braidsdk.kernels.weight import in_one_piece


def norm_qkv_torch(
    hidden: Tensor, weights: NormQKVWeights, eps: float, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor
) -> Tensor:
    """What `op.norm_qkv` computes; the projection may be one of `projection.pack`."""
    kv_heads, head_dim = kv.shape[2], kv.shape[4]
    normed = in_blocks(lambda block: rms_norm_reference(block, weights.norm, eps), hidden)
    packed = project(normed, in_one_piece(weights.qkv), weights.bias)
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
    if slots.device.type == "cpu":  # only these slots are touched: other threads write to other pages
        real = slots >= 0
        if not bool(real.all()):
            slots, keys, values = slots[real], keys[real], values[real]
        append(kv, slots, keys, values)
        return
    if not slots.numel():
        return
    # A padding row repeats what the first real row writes. With no real row, all write back what slot 0 holds.
    real = slots >= 0
    rows = torch.where(real, torch.arange(len(slots), device=slots.device), real.int().argmax())
    some, slots = real.any(), slots[rows].clamp(min=0)
    pages, offsets = slots // kv.shape[3], slots % kv.shape[3]
    held_keys, held_values = kv[:, pages, :, offsets].unbind(1)
    append(kv, slots, torch.where(some, keys[rows], held_keys), torch.where(some, values[rows], held_values))
