"""RMSNorm, gate and up projections and SwiGLU, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import gemm, gemv, load_ahead, own_rows, prefetch, wait_for_inputs


@triton.jit(do_not_specialize=["rows"])
def norm_swiglu_kernel(
    hidden_ptr,
    norm_ptr,
    w_ptr,
    out_ptr,
    rows,
    eps,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    MATRIX: tl.constexpr,
    WARPS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """All of it, for ROWS rows; a program owns BLOCK_N rows of the gate and the same of up. out: [rows, INNER].

    With MATRIX, the hidden states have been normed already, and `norm` is None.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row0 = tl.program_id(1) * ROWS
    N: tl.constexpr = 2 * INNER
    # Past the last one, a gate reads rows of up; nothing of it is kept.
    if MATRIX:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        sets = (n, n + INNER)
        prefetch(w_ptr, sets, N, HIDDEN, BLOCK_N, BLOCK_K, 1, USE_PDL)
        wait_for_inputs(USE_PDL)
        gate, up = gemm(hidden_ptr, w_ptr, sets, row0, rows, N, HIDDEN, ROWS, BLOCK_N, BLOCK_K, STAGES, 1)
        m = row0 + tl.arange(0, ROWS)
        real = (m < rows)[:, None] & (n < INNER)[None, :]
        tl.store(out_ptr + m.to(tl.int64)[:, None] * INNER + n[None, :], _silu(gate, up).to(dtype), real)
    else:
        n = own_rows(BLOCK_N, WARPS)
        sets = (n, n + INNER)
        weights = load_ahead(w_ptr, sets, N, HIDDEN, BLOCK_K, STAGES)
        wait_for_inputs(USE_PDL)
        products = gemv(
            hidden_ptr, norm_ptr, w_ptr, weights, sets, row0, rows, eps, N, HIDDEN, ROWS, BLOCK_N, BLOCK_K, WARPS
        )
        for m in tl.static_range(ROWS):
            at = out_ptr + (row0 + m).to(tl.int64) * INNER + n
            tl.store(at, _silu(products[m], products[ROWS + m]).to(dtype), (row0 + m < rows) & (n < INNER))


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, INNER: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """What follows the projections: gate_up [rows, 2 * INNER], out [rows, INNER]; BLOCK columns of a row a program."""
    wait_for_inputs(USE_PDL)
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * (2 * INNER) + n, n < INNER, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * INNER) + INNER + n, n < INNER, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * INNER + n, _silu(gate, up).to(out_ptr.dtype.element_ty), n < INNER)


@triton.jit
def _silu(gate, up):
    """silu(gate) * up, in float32. `gate / (1 + e^-gate)` needs no care: e^-gate = inf gives 0, as it should."""
    return gate / (1.0 + tl.exp(-gate)) * up
