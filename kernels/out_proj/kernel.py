"""Projection and residual, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import arrive_last, gemm, gemv, load_ahead, own_rows, prefetch, wait_for_inputs


@triton.jit(do_not_specialize=["rows"])
def out_proj_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    parts_ptr,
    counters_ptr,
    out_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    MATRIX: tl.constexpr,
    WARPS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """ROWS rows of x [rows, K], residual and out [rows, N], BLOCK_N rows of w [N, K]; rounded once.

    With SPLITS > 1, as many programs share the columns: each leaves its products in `parts`, float32
    [SPLITS, rows, N], and the last to arrive adds them up, in their order.
    """
    row0 = tl.program_id(1) * ROWS
    if MATRIX:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        prefetch(w_ptr, (n,), N, K, BLOCK_N, BLOCK_K, SPLITS, USE_PDL)
        wait_for_inputs(USE_PDL)
        (product,) = gemm(x_ptr, w_ptr, (n,), row0, rows, N, K, ROWS, BLOCK_N, BLOCK_K, STAGES, SPLITS)
        m = row0 + tl.arange(0, ROWS)
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        real = (m < rows)[:, None] & (n < N)[None, :]
        if SPLITS > 1:
            part = rows.to(tl.int64) * N
            tl.store(parts_ptr + tl.program_id(2) * part + at, product, real)
            if not arrive_last(counters_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), SPLITS):
                return
            product = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for split in tl.static_range(SPLITS):
                product += tl.load(parts_ptr + split * part + at, real, other=0.0, cache_modifier=".cg")
        residual = tl.load(residual_ptr + at, real, other=0.0)
        _finish(product, residual, at, n[None, :], real, bias_ptr, out_ptr, N)
    else:
        n = own_rows(BLOCK_N, WARPS)
        weights = load_ahead(w_ptr, (n,), N, K, BLOCK_K, STAGES)
        wait_for_inputs(USE_PDL)
        residuals = ()
        for m in tl.static_range(ROWS):
            at = residual_ptr + (row0 + m).to(tl.int64) * N + n
            residuals = residuals + (tl.load(at, (row0 + m < rows) & (n < N), other=0.0),)
        products = gemv(x_ptr, None, w_ptr, weights, (n,), row0, rows, 0.0, N, K, ROWS, BLOCK_N, BLOCK_K, WARPS)
        for m in tl.static_range(ROWS):
            at = (row0 + m).to(tl.int64) * N + n
            _finish(products[m], residuals[m], at, n, (row0 + m < rows) & (n < N), bias_ptr, out_ptr, N)


@triton.jit
def _finish(product, residual, at, n, real, bias_ptr, out_ptr, N: tl.constexpr):
    """Add bias and residual to products of the columns `n`, round, and store them at `at`."""
    if bias_ptr is not None:
        product += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (residual.to(tl.float32) + product).to(out_ptr.dtype.element_ty), real)
