"""RMSNorm, QKV projection, QK-norm, RoPE and KV append: the contract, its checks, and what computes it."""

from collections.abc import Callable

import torch
from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_head_norms, check_like, check_shape, check_tensors
from braidsdk.kernels.measure import measured
from braidsdk.kernels.norm_qkv.eager import norm_qkv_torch
from braidsdk.kernels.norm_qkv.launch import norm_qkv_triton
from braidsdk.kernels.norm_qkv.native import norm_qkv_native
from braidsdk.kernels.norm_qkv.reference import NormQKVWeights

BACKENDS: dict[Backend, Callable[..., Tensor]] = {
    "torch": norm_qkv_torch,
    "native": norm_qkv_native,
    "triton": norm_qkv_triton,
}


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
    backend: Backend = "torch",
) -> Tensor:
    """Project normed hidden states, append keys and values to the paged memory, return the queries.

    Args:
        hidden: [tokens, hidden].
        weights: the layer's packed weights.
        eps: of all norms.
        cos, sin: at the position of each token in its segment's frame, float32 [tokens, head_dim / 2] (float64 for
            float64 inputs, which only torch takes).
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim]; written in place.
        slots: where each token's key and value go, int64 [tokens]; a negative slot appends nothing (a padding row).
        backend: what computes it; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16, and a head_dim that is a multiple of 16; "native" contiguous ones in bfloat16 on the CPU, and a
            head_dim that `native.head_dim_obstacle` lets pass.

    Returns:
        Unrotated queries, normed if the model does that, [tokens, q_heads, head_dim].

    Raises:
        RuntimeError: the backend can't run here.
        IndexError: "native" was asked for, and a slot lies beyond the memory.
        ValueError: shapes, dtypes or strides are not as above, or one of q_norm and k_norm is given without the other.
    """
    op, (rows, size), (_, _, kv_heads, _, head_dim) = "norm_qkv", hidden.shape, kv.shape
    heads = weights.qkv.shape[0] // head_dim
    check_tensors(op, backend, hidden, weights.norm, weights.qkv, weights.bias, weights.q_norm, weights.k_norm, kv)
    if heads <= 2 * kv_heads:
        raise ValueError(f"{op}: expected query heads, got {heads} heads in all, {kv_heads} of keys.")
    check_shape(op, "norm", weights.norm, size)
    check_shape(op, "qkv", weights.qkv, heads * head_dim, size)
    if weights.bias is not None:
        check_shape(op, "bias", weights.bias, heads * head_dim)
    check_head_norms(op, weights.q_norm, weights.k_norm, head_dim)
    angles = torch.promote_types(hidden.dtype, torch.float32)
    for name, tensor, dtype, *shape in (
        ("cos", cos, angles, rows, head_dim // 2),
        ("sin", sin, angles, rows, head_dim // 2),
        ("slots", slots, torch.int64, rows),
    ):
        check_shape(op, name, tensor, *shape)
        check_like(op, tensor, dtype, hidden.device, name)
    return BACKENDS[backend](hidden, weights, eps, cos, sin, kv, slots)
