"""RMSNorm, QKV projection, QK-norm, RoPE and KV append by the C kernels, in one pass over the weight."""

from torch import Tensor

from braidsdk.kernels.norm_qkv.reference import NormQKVWeights
from braidsdk.kernels.products.native import HEADS, largest, run


def norm_qkv_native(
    hidden: Tensor, weights: NormQKVWeights, eps: float, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor
) -> Tensor:
    """What `op.norm_qkv` computes.

    Raises:
        ValueError: head_dim is no multiple of 16.
        IndexError: a slot lies beyond the memory.
    """
    (rows, size), (_, pages, kv_heads, page_size, head_dim) = hidden.shape, kv.shape
    outputs = weights.qkv.shape[0]
    if head_dim % 16:
        raise ValueError(
            f"norm_qkv: backend='native' needs a head_dim that is a multiple of 16, got {head_dim}; pass "
            "backend='torch'."
        )
    if rows and (found := largest(slots)) >= pages * page_size:
        raise IndexError(f"norm_qkv: expected slots below {pages * page_size}, got {found}.")
    queries = hidden.new_empty(rows, outputs // head_dim - 2 * kv_heads, head_dim)
    run(
        kind=HEADS,
        rows=rows,
        columns=size,
        outputs=outputs,
        x=hidden,
        norm=weights.norm,
        weight=weights.qkv,
        bias=weights.bias,
        eps=eps,
        out=queries,
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        cos=cos,
        sin=sin,
        slots=slots,
        kv=kv,
        pages=pages,
        kv_heads=kv_heads,
        page_size=page_size,
        head_dim=head_dim,
    )
    return queries
