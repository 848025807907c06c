"""RMSNorm, QKV projection, QK-norm, RoPE and KV append: checks, and which implementation runs."""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.launch import (
    MATRIX_ROWS,
    Path,
    Tile,
    Tiles,
    check_head_norms,
    check_shape,
    check_triton,
    counters,
    launch_options,
    padded,
    tile_for,
)
from braidsdk.kernels.measure import measured
from braidsdk.kernels.norm_qkv.reference import NormQKVWeights, norm_qkv_reference
from braidsdk.kernels.products import products
from braidsdk.kernels.products.amx import norm_qkv_amx
from braidsdk.kernels.rms_norm import rms_norm

TILES: Tiles = {
    1024: {
        1: Tile(block_n=16, block_k=512, warps=4, stages=2),
        2: Tile(block_n=32, block_k=256, warps=8, stages=4),
        16: Tile(block_n=64, block_k=128, warps=4, stages=4),
        32: Tile(block_n=64, block_k=128, warps=4, stages=4),
        64: Tile(block_n=64, block_k=128, warps=4, stages=4),
    },
    2048: {
        1: Tile(block_n=16, block_k=256, warps=4, stages=8),
        2: Tile(block_n=16, block_k=256, warps=4, stages=2),
        16: Tile(block_n=128, block_k=256, warps=8, stages=2),
        32: Tile(block_n=128, block_k=256, warps=8, stages=2),
        64: Tile(block_n=64, block_k=128, warps=4, stages=4),
    },
    4096: {
        1: Tile(block_n=8, block_k=512, warps=2, stages=1),
        2: Tile(block_n=16, block_k=256, warps=4, stages=2),
        16: Tile(block_n=64, block_k=256, warps=4, stages=4),
        32: Tile(block_n=64, block_k=128, warps=4, stages=6),
        64: Tile(block_n=64, block_k=128, warps=4, stages=4),
    },
}
"""The kernels' shapes."""

FEW_ROWS = 64
"""Up to here our products are faster; above, the library's. Either stands between a norm and a kernel that finishes."""

_FINISH_ROWS, _FINISH_FEW_ROWS = 16, 8
"""Rows of a head that one program finishes: of many rows, and of few, where more programs share the work."""


def _appended_bytes(hidden: Tensor, kv: Tensor, **_: object) -> int:
    return 2 * len(hidden) * kv.shape[2] * kv.shape[4] * kv.element_size()


@measured("norm_qkv", kv_bytes=_appended_bytes)
def norm_qkv(
    hidden: Tensor,
    weights: NormQKVWeights,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
    *,
    path: Path = "torch",
) -> Tensor:
    """Project normed hidden states, append keys and values to the paged memory, return the queries.

    Args:
        hidden: [tokens, hidden].
        weights: the layer's packed weights.
        eps: of all norms.
        cos, sin: at the position of each token in its segment's frame, float32 [tokens, head_dim / 2].
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim]; written in place.
        slots: where each token's key and value go, int64 [tokens]; a negative slot appends nothing (a padding row).
        path: which implementation; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16, and a head_dim that is a multiple of 16; "amx" contiguous ones in bfloat16 on the CPU, and a
            head_dim that is a multiple of 32.

    Returns:
        Unrotated queries, normed if the model does that, [tokens, q_heads, head_dim].

    Raises:
        RuntimeError: what was asked for can't run here.
        IndexError: "amx" was asked for, and a slot lies beyond the memory.
        ValueError: Triton or "amx" was asked for, and shapes, dtypes or strides are not as above, or one of q_norm and
            k_norm is given without the other.
    """
    if path == "torch":
        return norm_qkv_reference(hidden, weights, eps, cos, sin, kv, slots)
    if path == "amx":
        return norm_qkv_amx(hidden, weights, eps, cos, sin, kv, slots)
    rows = len(hidden)
    _, pages, kv_heads, page_size, head_dim = kv.shape
    heads = weights.qkv.shape[0] // head_dim
    q_heads = heads - 2 * kv_heads
    _check(hidden, weights, cos, sin, kv, slots, q_heads)
    queries = hidden.new_empty(rows, q_heads, head_dim)
    if not rows:
        return queries

    from braidsdk.kernels.norm_qkv.kernel import finish_heads_kernel, norm_qkv_kernel

    options = launch_options(hidden.device)
    geometry = (q_heads, kv_heads, head_dim, padded(head_dim), page_size)
    block_rows, tile = tile_for(TILES, rows, hidden.shape[1])
    if block_rows >= MATRIX_ROWS:
        normed = rms_norm(hidden, weights.norm, eps, path="triton")
        bias = weights.bias
        if rows > FEW_ROWS:
            parts, bias = linear(normed, weights.qkv, bias)[None], None
        else:
            parts = products(normed, weights.qkv, block_rows, tile)
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
        weights.qkv,
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


def _check(
    hidden: Tensor, weights: NormQKVWeights, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor, q_heads: int
) -> None:
    op = "norm_qkv"
    check_triton(op, hidden, weights.norm, weights.qkv, weights.bias, weights.q_norm, weights.k_norm, kv)
    (rows, size), head_dim = hidden.shape, kv.shape[4]
    heads = q_heads + 2 * kv.shape[2]
    if q_heads < 1 or head_dim < 16 or head_dim % 16:
        raise ValueError(
            f"{op}: expected query heads and a head_dim that is a multiple of 16, got {q_heads} query heads of "
            f"{head_dim}; pass path='torch'."
        )
    check_shape(op, "norm", weights.norm, size)
    check_shape(op, "qkv", weights.qkv, heads * head_dim, size)
    if weights.bias is not None:
        check_shape(op, "bias", weights.bias, heads * head_dim)
    check_head_norms(op, weights.q_norm, weights.k_norm, head_dim)
    check_shape(op, "slots", slots, rows)
    for name, tensor, dtype in (
        ("cos", cos, torch.float32),
        ("sin", sin, torch.float32),
        ("slots", slots, torch.int64),
    ):
        if tensor.dtype != dtype or tensor.device != hidden.device or not tensor.is_contiguous():
            got = f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
            raise ValueError(f"{op}: expected {name} contiguous, {dtype} on {hidden.device}, got {got}.")
        if tensor is not slots:
            check_shape(op, name, tensor, rows, head_dim // 2)
