"""Projection and residual, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import gemv, load_ahead, own_rows, wait_for_inputs
from braidsdk.kernels.products.kernel import sum_parts


@triton.jit(do_not_specialize=["rows"])
def out_proj_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """All of it, for ROWS rows of x [rows, K], residual and out [rows, N], BLOCK_N rows of w [N, K]; rounded once."""
    row0 = tl.program_id(1) * ROWS
    n = own_rows(BLOCK_N, WARPS)
    weights = load_ahead(w_ptr, scales_ptr, (n,), N, K, BLOCK_K, STAGES)
    wait_for_inputs(USE_PDL)
    residuals = ()
    for m in tl.static_range(ROWS):
        at = residual_ptr + (row0 + m).to(tl.int64) * N + n
        residuals = residuals + (tl.load(at, (row0 + m < rows) & (n < N), other=0.0),)
    products = gemv(x_ptr, None, w_ptr, scales_ptr, weights, (n,), row0, rows, 0.0, N, K, ROWS, BLOCK_N, BLOCK_K, WARPS)
    for m in tl.static_range(ROWS):
        at = (row0 + m).to(tl.int64) * N + n
        _finish(products[m], residuals[m], at, n, (row0 + m < rows) & (n < N), bias_ptr, out_ptr, N)


@triton.jit(do_not_specialize=["rows"])
def add_residual_kernel(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """What follows the products, parts [SPLITS, rows, N]: BLOCK columns of a row a program."""
    wait_for_inputs(USE_PDL)
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * N + n
    product = sum_parts(parts_ptr, at, n < N, rows, N, SPLITS)
    residual = tl.load(residual_ptr + at, n < N, other=0.0)
    _finish(product, residual, at, n, n < N, bias_ptr, out_ptr, N)


@triton.jit
def _finish(product, residual, at, n, real, bias_ptr, out_ptr, N: tl.constexpr):
    """Add bias and residual to products of the columns `n`, round, and store them at `at`."""
    if bias_ptr is not None:
        product += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (residual.to(tl.float32) + product).to(out_ptr.dtype.element_ty), real)
