"""Final norm, LM head and greedy choice, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import arrive_last, gemv, load_ahead, own_rows, wait_for_inputs


@triton.jit(do_not_specialize=["rows"])
def norm_head_kernel(
    hidden_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,
    logits_ptr,
    rows,
    eps,
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """ROWS rows of hidden [rows, HIDDEN], BLOCK_N of the head [VOCAB, HIDDEN]; logits: float32 [rows, VOCAB]."""
    row0 = tl.program_id(1) * ROWS
    n = own_rows(BLOCK_N, WARPS)
    weights = load_ahead(w_ptr, scales_ptr, (n,), VOCAB, HIDDEN, BLOCK_K, STAGES)
    wait_for_inputs(USE_PDL)
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
        VOCAB,
        HIDDEN,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        WARPS,
    )
    for m in tl.static_range(ROWS):
        at = logits_ptr + (row0 + m).to(tl.int64) * VOCAB + n
        tl.store(at, products[m], (row0 + m < rows) & (n < VOCAB))


@triton.jit(do_not_specialize=["finite_at"])
def greedy_kernel(
    logits_ptr,
    tops_ptr,
    top_ids_ptr,
    finite_parts_ptr,
    counters_ptr,
    out_ptr,
    finite_at,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """PARTS programs a row find the best of BLOCK logits each; the last to arrive, the best of those.

    tops, top_ids, finite_parts: [rows, PARTS]; out: int64, ids, and `finite_at` behind them whether rows are finite.
    PARTS_BLOCK >= PARTS, a power of two.
    """
    wait_for_inputs(USE_PDL)
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    n = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * VOCAB + n, n < VOCAB, other=float("-inf"))
    broken = (n < VOCAB) & ((x != x) | (tl.abs(x) == float("inf")))
    x = tl.where(x == x, x, float("-inf"))
    top = tl.max(x, 0)
    at = row * PARTS + part
    tl.store(tops_ptr + at, top)
    tl.store(top_ids_ptr + at, tl.min(tl.where((x == top) & (n < VOCAB), n, VOCAB), 0))
    tl.store(finite_parts_ptr + at, 1 - tl.max(broken.to(tl.int32), 0))
    if arrive_last(counters_ptr + row, PARTS):
        p = tl.arange(0, PARTS_BLOCK)
        parts_at = row * PARTS + p
        tops = tl.load(tops_ptr + parts_at, p < PARTS, other=float("-inf"), cache_modifier=".cg")
        top_ids = tl.load(top_ids_ptr + parts_at, p < PARTS, other=VOCAB, cache_modifier=".cg")
        finite = tl.load(finite_parts_ptr + parts_at, p < PARTS, other=1, cache_modifier=".cg")
        best = tl.min(tl.where(tops == tl.max(tops, 0), top_ids, VOCAB), 0)
        tl.store(out_ptr + row, best.to(tl.int64))
        tl.store(out_ptr + finite_at + row, tl.min(finite, 0).to(tl.int64))
