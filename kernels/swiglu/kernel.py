"""RMSNorm, gate and up projections and SwiGLU, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import gemv, load_ahead, own_rows, wait_for_inputs
from braidsdk.kernels.products.kernel import sum_parts


@triton.jit(do_not_specialize=["rows"])
def norm_swiglu_kernel(
    hidden_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,
    out_ptr,
    rows,
    eps,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """All of it, for ROWS rows; a program owns BLOCK_N rows of the gate and the same of up. out: [rows, INNER]."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row0 = tl.program_id(1) * ROWS
    n = own_rows(BLOCK_N, WARPS)
    # Past the last one, a gate reads rows of up; nothing of it is kept.
    sets = (n, n + INNER)
    weights = load_ahead(w_ptr, scales_ptr, sets, 2 * INNER, HIDDEN, BLOCK_K, STAGES)
    wait_for_inputs(USE_PDL)
    products = gemv(
        hidden_ptr,
        norm_ptr,
        w_ptr,
        scales_ptr,
        weights,
        sets,
        row0,
        rows,
        eps,
        2 * INNER,
        HIDDEN,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        WARPS,
    )
    for m in tl.static_range(ROWS):
        at = out_ptr + (row0 + m).to(tl.int64) * INNER + n
        tl.store(at, _silu(products[m], products[ROWS + m]).to(dtype), (row0 + m < rows) & (n < INNER))


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    parts_ptr,
    out_ptr,
    rows,
    INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """What follows the products: BLOCK columns of a row a program.

    parts: [SPLITS, rows, 2 * INNER]. out: [rows, INNER].
    """
    wait_for_inputs(USE_PDL)
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = sum_parts(parts_ptr, row * (2 * INNER) + n, n < INNER, rows, 2 * INNER, SPLITS)
    up = sum_parts(parts_ptr, row * (2 * INNER) + INNER + n, n < INNER, rows, 2 * INNER, SPLITS)
    tl.store(out_ptr + row * INNER + n, _silu(gate, up).to(out_ptr.dtype.element_ty), n < INNER)


@triton.jit
def _silu(gate, up):
    """silu(gate) * up, in float32. `gate / (1 + e^-gate)` needs no care: e^-gate = inf gives 0, as it should."""
    return gate / (1.0 + tl.exp(-gate)) * up
