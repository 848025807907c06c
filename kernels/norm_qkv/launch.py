"""RMSNorm, QKV projection, QK-norm, RoPE and KV append by Triton: the launch."""

from math import gcd
from pathlib import Path

import torch
from torch import Tensor

from braidsdk.kernels.launch import MATRIX_ROWS, counters, launch_options, padded, pointers, read_tiles, tile_for
from braidsdk.kernels.norm_qkv.reference import NormQKVWeights
from braidsdk.kernels.products import many_products, products
from braidsdk.kernels.rms_norm import rms_norm
from braidsdk.kernels.weight import in_one_piece

TILES = read_tiles(Path(__file__).with_name("tiles.json"))
"""The kernels' shapes."""

FEW_ROWS = 64
"""Up to here our products are faster; above, the library's. Either stands between a norm and a kernel that finishes."""

_FINISH_ROWS, _FINISH_FEW_ROWS = 16, 8
"""Rows of a head that one program finishes: of many rows, and of few, where more programs share the work."""


def norm_qkv_triton(
    hidden: Tensor, weights: NormQKVWeights, eps: float, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor
) -> Tensor:
    """What `op.norm_qkv` computes.

    Raises:
        ValueError: head_dim is no multiple of 16.
    """
    rows = len(hidden)
    _, pages, kv_heads, page_size, head_dim = kv.shape
    weight = in_one_piece(weights.qkv)
    heads = weight.shape[0] // head_dim
    q_heads = heads - 2 * kv_heads
    if head_dim % 16:
        raise ValueError(
            f"norm_qkv: backend='triton' needs a head_dim that is a multiple of 16, got {head_dim}; pass "
            "backend='torch'."
        )
    queries = hidden.new_empty(rows, q_heads, head_dim)
    if not rows:
        return queries

    from braidsdk.kernels.norm_qkv.kernel import finish_heads_kernel, norm_qkv_kernel

    options = launch_options(hidden.device)
    geometry = (q_heads, kv_heads, head_dim, padded(head_dim), page_size)
    block_rows, tile = tile_for(TILES, rows, weight)
    if block_rows >= MATRIX_ROWS:
        normed = rms_norm(hidden, weights.norm, eps, backend="triton")
        bias = weights.bias
        if rows > FEW_ROWS:
            parts, bias = many_products(normed, weight, bias)[None], None
        else:
            parts = products(normed, weight, block_rows, tile)
        finish_rows = _FINISH_ROWS if rows > FEW_ROWS else _FINISH_FEW_ROWS
        finish_heads_kernel[(heads, -(-rows // finish_rows))](
            parts,
            bias,
            weights.q_norm,
            weights.k_norm,
            cos,
            sin,
            slots,
            queries,
            kv,
            rows,
            pages,
            eps,
            *geometry,
            len(parts),
            finish_rows,
            num_warps=4,
            **options,
        )
        return queries
    blocks = -(-rows // block_rows)
    block_n = gcd(tile.block_n, head_dim)
    packed = torch.empty(rows, heads * head_dim, dtype=torch.float32, device=hidden.device)
    norm_qkv_kernel[(heads * head_dim // block_n, blocks)](
        hidden,
        weights.norm,
        *pointers(weight),
        weights.bias,
        weights.q_norm,
        weights.k_norm,
        cos,
        sin,
        slots,
        packed,
        counters("norm_qkv", hidden.device, blocks * heads),
        queries,
        kv,
        rows,
        pages,
        eps,
        *geometry,
        hidden.shape[1],
        block_rows,
        block_n,
        tile.columns(hidden),
        tile.stages,
        tile.warps,
        num_warps=tile.warps,
        num_stages=1,
        **options,
    )
    return queries
