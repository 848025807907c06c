"""Several rows of `x` times a weight matrix that is read once: device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import let_next_begin, wait_for_inputs


@triton.jit(do_not_specialize=["rows"])
def products_kernel(
    x_ptr,
    w_ptr,
    parts_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """ROWS rows of x [rows, K], BLOCK_N rows of w [N, K] and a SPLITS-th of the columns a program.

    parts: float32 [SPLITS, rows, N].

    The weight's rows are the product's M: matrix instructions of compute capability 9 want 64 of them at least. If
    STAGES loads hold all that a program needs of the weight, they are on their way before it waits for `x`.
    """
    SPAN: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    LOADS: tl.constexpr = SPAN // BLOCK_K
    CHECK_N: tl.constexpr = N % BLOCK_N != 0
    CHECK_K: tl.constexpr = SPAN * SPLITS != K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w_rows, w_real = w_ptr + n.to(tl.int64)[:, None] * K, (n < N)[:, None]
    x_rows, x_real = x_ptr + m.to(tl.int64)[:, None] * K, (m < rows)[:, None]
    first = tl.program_id(2) * SPAN
    product = tl.zeros([BLOCK_N, ROWS], tl.float32)
    let_next_begin(USE_PDL)
    if LOADS <= STAGES:
        weights, xs = (), ()
        for load in tl.static_range(LOADS):
            k = first + load * BLOCK_K + tl.arange(0, BLOCK_K)
            weights = weights + (_load(w_rows, w_real, k, K, CHECK_N, CHECK_K),)
        wait_for_inputs(USE_PDL)
        for load in tl.static_range(LOADS):
            k = first + load * BLOCK_K + tl.arange(0, BLOCK_K)
            xs = xs + (_load(x_rows, x_real, k, K, True, CHECK_K),)
        for load in tl.static_range(LOADS):
            product = tl.dot(weights[load], tl.trans(xs[load]), product, input_precision="ieee")
    else:
        wait_for_inputs(USE_PDL)
        for column in tl.range(0, SPAN, BLOCK_K, num_stages=STAGES):
            k = first + column + tl.arange(0, BLOCK_K)
            w = _load(w_rows, w_real, k, K, CHECK_N, CHECK_K)
            x = _load(x_rows, x_real, k, K, True, CHECK_K)
            product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
    part = parts_ptr + tl.program_id(2) * rows.to(tl.int64) * N
    tl.store(part + m.to(tl.int64)[None, :] * N + n[:, None], product, (m < rows)[None, :] & (n < N)[:, None])


@triton.jit
def _load(rows, real, k, K: tl.constexpr, CHECK_ROWS: tl.constexpr, CHECK_K: tl.constexpr):
    """Columns `k` of these rows, zero where a row is not `real` and from column K on."""
    if CHECK_K:
        return tl.load(rows + k[None, :], real & (k < K)[None, :], other=0.0)
    if CHECK_ROWS:
        return tl.load(rows + k[None, :], real, other=0.0)
    return tl.load(rows + k[None, :])


@triton.jit
def sum_parts(parts_ptr, at, real, rows, N: tl.constexpr, SPLITS: tl.constexpr):
    """What `products_kernel` left at `at` in each of its parts, added up in their order, in float32."""
    total = tl.load(parts_ptr + at, real, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + split * rows.to(tl.int64) * N + at, real, other=0.0)
    return total
