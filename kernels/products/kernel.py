"""Several rows of `x` times a weight matrix that is read once: device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import GROUP, let_next_begin, wait_for_inputs


@triton.jit(do_not_specialize=["rows"])
def products_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
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

    A weight in int8 has scales, float32 [N, groups of GROUP columns], else None. BLOCK_K then divides GROUP: a load
    lies in one group, whose scale multiplies its product.
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
            scales = _load_scales(scales_ptr, n, first + load * BLOCK_K, N, K)
            product = _add_product(product, weights[load], xs[load], scales)
    else:
        wait_for_inputs(USE_PDL)
        for column in tl.range(0, SPAN, BLOCK_K, num_stages=STAGES):
            k = first + column + tl.arange(0, BLOCK_K)
            w = _load(w_rows, w_real, k, K, CHECK_N, CHECK_K)
            x = _load(x_rows, x_real, k, K, True, CHECK_K)
            product = _add_product(product, w, x, _load_scales(scales_ptr, n, first + column, N, K))
    part = parts_ptr + tl.program_id(2) * rows.to(tl.int64) * N
    tl.store(part + m.to(tl.int64)[None, :] * N + n[:, None], product, (m < rows)[None, :] & (n < N)[:, None])


@triton.jit
def _load_scales(scales_ptr, n, column, N: tl.constexpr, K: tl.constexpr):
    """Of these rows of the weight, for the group of a column: float32 [BLOCK_N]; None without scales."""
    scales = None
    if scales_ptr is not None:
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        scales = tl.load(scales_ptr + n.to(tl.int64) * GROUPS + column // GROUP, (n < N) & (column < K), other=0.0)
    return scales


@triton.jit
def _add_product(total, w, x, scales):
    """total + w @ x.T, times the rows' scales if there are any."""
    if scales is not None:
        total += tl.dot(w.to(x.dtype), tl.trans(x), input_precision="ieee") * scales[:, None]
    else:
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    return total


@triton.jit
def _load(rows, real, k, K: tl.constexpr, CHECK_ROWS: tl.constexpr, CHECK_K: tl.constexpr):
    """Columns `k` of these rows, zero where a row is not `real` and from column K on."""
    if CHECK_K:
        return tl.load(rows + k[None, :], real & (k < K)[None, :], other=0)
    if CHECK_ROWS:
        return tl.load(rows + k[None, :], real, other=0)
    return tl.load(rows + k[None, :])


@triton.jit
def dense_kernel(values_ptr, scales_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """A row of a weight in int8 as numbers of another dtype: BLOCK columns a program. out: [N, K]."""
    let_next_begin(USE_PDL)
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    row, k = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * K + k, k < K, other=0).to(tl.float32)
    scales = tl.load(scales_ptr + row * GROUPS + k // GROUP, k < K, other=0.0)
    wait_for_inputs(USE_PDL)
    tl.store(out_ptr + row * K + k, (values * scales).to(out_ptr.dtype.element_ty), k < K)


@triton.jit
def sum_parts(parts_ptr, at, real, rows, N: tl.constexpr, SPLITS: tl.constexpr):
    """What `products_kernel` left at `at` in each of its parts, added up in their order, in float32."""
    total = tl.load(parts_ptr + at, real, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + split * rows.to(tl.int64) * N + at, real, other=0.0)
    return total
