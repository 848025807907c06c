"""RMSNorm, QKV projection, QK-norm, RoPE and KV append, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import arrive_last, gemv, load_ahead, own_rows, wait_for_inputs
from braidsdk.kernels.products.kernel import sum_parts


@triton.jit(do_not_specialize=["rows", "pages"])
def norm_qkv_kernel(
    hidden_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    packed_ptr,
    counters_ptr,
    queries_ptr,
    kv_ptr,
    rows,
    pages,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """All of it, for ROWS rows and BLOCK_N rows of the weight a program; BLOCK_N divides HEAD_DIM. The bias may be
    None, and so may both QK norms. BLOCK_D is the power of two that holds HEAD_DIM; what is beyond is masked.

    A head is more weight than one multiprocessor should read alone, so HEAD_DIM / BLOCK_N programs share it: each
    leaves its products in `packed`, float32 [rows, heads * HEAD_DIM], and the last to arrive finishes the head.
    """
    PARTS: tl.constexpr = HEAD_DIM // BLOCK_N
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    N: tl.constexpr = HEADS * HEAD_DIM
    head, row0 = tl.program_id(0) // PARTS, tl.program_id(1) * ROWS
    d = tl.arange(0, BLOCK_D // 2)
    n = own_rows(BLOCK_N, WARPS)
    weights = load_ahead(w_ptr, scales_ptr, (n,), N, HIDDEN, BLOCK_K, STAGES)
    head_norm = None
    if q_norm_ptr is not None:
        head_norm = _load_head_norm(q_norm_ptr, k_norm_ptr, head, d, Q_HEADS, HEAD_DIM, BLOCK_D)
    wait_for_inputs(USE_PDL)
    places = ()  # of all rows, on their way while the products are computed
    for m in tl.static_range(ROWS):
        places = places + _load_place(cos_ptr, sin_ptr, slots_ptr, row0 + m, d, rows, HEAD_DIM, BLOCK_D)
    products = gemv(
        hidden_ptr,
        norm_ptr,
        w_ptr,
        scales_ptr,
        weights,
        (n,),
        row0,
        rows,
        eps,
        N,
        HIDDEN,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        WARPS,
    )
    for m in tl.static_range(ROWS):
        product = products[m]
        if bias_ptr is not None:
            product += tl.load(bias_ptr + n).to(tl.float32)
        tl.store(packed_ptr + (row0 + m).to(tl.int64) * N + n, product, row0 + m < rows)
    if arrive_last(counters_ptr + tl.program_id(1) * HEADS + head, PARTS):
        for m in tl.static_range(ROWS):
            at = (row0 + m).to(tl.int64) * N + head * HEAD_DIM + d
            real = _of_a_head(row0 + m < rows, d, HEAD_DIM, BLOCK_D)
            first = tl.load(packed_ptr + at, real, other=0.0, cache_modifier=".cg")
            second = tl.load(packed_ptr + at + HEAD_DIM // 2, real, other=0.0, cache_modifier=".cg")
            _finish_head(
                first, second, head_norm, places[3 * m], places[3 * m + 1], places[3 * m + 2], queries_ptr, kv_ptr,
                head, row0 + m, d, rows, pages, eps, Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_D, PAGE, 0,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "pages"])
def finish_heads_kernel(
    parts_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    queries_ptr,
    kv_ptr,
    rows,
    pages,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """What follows the products: QK-norm, RoPE and append, for ROWS rows of one head a program.

    parts: [SPLITS, rows, heads * HEAD_DIM], to which the bias is still to be added. It may be None, and so may both QK
    norms.
    """
    N: tl.constexpr = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0)
    d = tl.arange(0, BLOCK_D // 2)[None, :]
    head_norm = None
    if q_norm_ptr is not None:
        head_norm = _load_head_norm(q_norm_ptr, k_norm_ptr, head, d, Q_HEADS, HEAD_DIM, BLOCK_D)
    wait_for_inputs(USE_PDL)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    slot, cos, sin = _load_place(cos_ptr, sin_ptr, slots_ptr, row, d, rows, HEAD_DIM, BLOCK_D)
    column, real = head * HEAD_DIM + d, _of_a_head(row < rows, d, HEAD_DIM, BLOCK_D)
    at = row.to(tl.int64) * N + column
    first = sum_parts(parts_ptr, at, real, rows, N, SPLITS)
    second = sum_parts(parts_ptr, at + HALF, real, rows, N, SPLITS)
    if bias_ptr is not None:
        first += _load_half(bias_ptr + column, d, HEAD_DIM, BLOCK_D).to(tl.float32)
        second += _load_half(bias_ptr + column + HALF, d, HEAD_DIM, BLOCK_D).to(tl.float32)
    _finish_head(
        first, second, head_norm, slot, cos, sin, queries_ptr, kv_ptr,
        head, row, d, rows, pages, eps, Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_D, PAGE, 1,
    )  # fmt: skip


@triton.jit
def _of_a_head(real, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`real`, for those of the dimensions `d` of half a head that there are."""
    return real if BLOCK_D == HEAD_DIM else real & (d < HEAD_DIM // 2)


@triton.jit
def _load_half(at, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions `d` of half a head, zero where there are none."""
    return tl.load(at) if BLOCK_D == HEAD_DIM else tl.load(at, d < HEAD_DIM // 2, other=0.0)


@triton.jit
def _load_head_norm(
    q_norm_ptr, k_norm_ptr, head, d, Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Both halves of the norm's weight for this head; a value head has none, and gets the keys'."""
    HALF: tl.constexpr = HEAD_DIM // 2
    if head < Q_HEADS:
        first = _load_half(q_norm_ptr + d, d, HEAD_DIM, BLOCK_D)
        second = _load_half(q_norm_ptr + HALF + d, d, HEAD_DIM, BLOCK_D)
    else:
        first = _load_half(k_norm_ptr + d, d, HEAD_DIM, BLOCK_D)
        second = _load_half(k_norm_ptr + HALF + d, d, HEAD_DIM, BLOCK_D)
    return first, second


@triton.jit
def _load_place(cos_ptr, sin_ptr, slots_ptr, row, d, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of these rows the slot, -1 where there is none, and cosines and sines of the dimensions `d` of half a head."""
    real = row < rows
    angles, there = row.to(tl.int64) * (HEAD_DIM // 2) + d, _of_a_head(real, d, HEAD_DIM, BLOCK_D)
    return (
        tl.load(slots_ptr + row, real, other=-1),
        tl.load(cos_ptr + angles, there, other=0.0),
        tl.load(sin_ptr + angles, there, other=0.0),
    )


@triton.jit
def _finish_head(
    first,
    second,
    head_norm,
    slot,
    cos,
    sin,
    queries_ptr,
    kv_ptr,
    head,
    row,
    d,
    rows,
    pages,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Both halves of one head's products: a query is normed, a key normed and rotated, a value copied.

    Where `head_norm` is None, nothing is normed.

    `slot`, `cos` and `sin` are from `_load_place`. `row` and `d` say which rows, and which dimensions of half a head: a
    number and a vector, or [ROWS, 1] and [1, BLOCK_D / 2]. AXIS is that of the dimensions; products beyond the head's
    are zero.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = queries_ptr.dtype.element_ty
    real = row < rows
    # All of it is rounded once, at the end: less often than the reference, which rounds the product first.
    if head_norm is not None and head < Q_HEADS + KV_HEADS:
        squares = tl.sum(first * first + second * second, AXIS, keep_dims=True)
        inverse_rms = tl.rsqrt(squares / HEAD_DIM + eps)
        first *= inverse_rms * head_norm[0].to(tl.float32)
        second *= inverse_rms * head_norm[1].to(tl.float32)
    if head < Q_HEADS:
        out = queries_ptr + row.to(tl.int64) * (Q_HEADS * HEAD_DIM) + head * HEAD_DIM + d
        there = _of_a_head(real, d, HEAD_DIM, BLOCK_D)
        tl.store(out, first.to(dtype), there)
        tl.store(out + HALF, second.to(dtype), there)
    else:
        there = _of_a_head(slot >= 0, d, HEAD_DIM, BLOCK_D)
        part, kv_head = 0, head - Q_HEADS
        if kv_head < KV_HEADS:
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
        else:
            part, kv_head = 1, kv_head - KV_HEADS
        page = part * pages.to(tl.int64) + slot // PAGE
        out = kv_ptr + ((page * KV_HEADS + kv_head) * PAGE + slot % PAGE) * HEAD_DIM + d
        tl.store(out, first.to(dtype), there)
        tl.store(out + HALF, second.to(dtype), there)
