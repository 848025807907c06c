"""Device code that the linear operations share: one or two rows of `x` times a weight matrix that is read once.

A program owns whole rows of the weight, in one or more `sets` of row numbers (gate and up, say), and gets a product per
set. It first asks for weights (`load_ahead`), then waits for the kernel before it (`wait_for_inputs`), so that
programmatic dependent launch hides the way from memory. It multiplies and adds in registers; for more rows there is
`products`, which uses matrix instructions.

`gemv` can apply an RMSNorm to `x` on the way: `x` is multiplied by the norm's weight, and the products by 1 / rms at
the end. That rounds less often than the reference does, and nothing waits for the mean square.
"""

import triton
import triton.language as tl

from braidsdk.kernels import weight

GROUP: tl.constexpr = tl.constexpr(weight.GROUP)
"""Columns of a weight in int8 that share a scale."""

LOAD: tl.constexpr = tl.constexpr(16)
"""Numbers of a weight in int8 that one thread loads at once."""


@triton.jit
def wait_for_inputs(USE_PDL: tl.constexpr):
    """Let the next kernel begin, then wait for the one before: from here on its results may be read, and ours written.

    Without programmatic dependent launch there is nothing to do.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(USE_PDL: tl.constexpr):
    """Let the next kernel begin: for one that is busy for long before it waits."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def arrive_last(counter, PARTS: tl.constexpr):
    """Whether this program is the last of `PARTS` to arrive at the counter, which it then resets.

    What the others stored before they arrived may then be read, past the L1 cache (`.cg`).
    """
    tl.debug_barrier()  # the atomic is one thread's; the stores before it are everyone's
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == PARTS - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def scaled(x, inverse_rms, weight, dtype: tl.constexpr):
    """The end of an RMSNorm as the reference has it: round `x / rms`, multiply by the weight, round again."""
    return ((x * inverse_rms).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def own_rows(BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """Numbers of the rows of the weight that a program owns in `gemv`: int32 [WARPS, BLOCK_N / WARPS]."""
    PER_WARP: tl.constexpr = BLOCK_N // WARPS
    first = tl.program_id(0) * BLOCK_N + tl.arange(0, WARPS)[:, None] * PER_WARP
    return first + tl.arange(0, PER_WARP)[None, :]


@triton.jit
def _columns(column, BLOCK_K: tl.constexpr, INT8: tl.constexpr):
    """Columns [column, column + BLOCK_K) as a load has them: int32 [1, 1, BLOCK_K]; with a weight in int8
    [1, 1, BLOCK_K / 16, 16], so that the 16 of a thread's load are summed before they meet their group's scale."""
    if INT8:
        first = column + tl.arange(0, BLOCK_K // LOAD)[None, None, :, None] * LOAD
        return first + tl.arange(0, LOAD)[None, None, None, :]
    return column + tl.arange(0, BLOCK_K)[None, None, :]


@triton.jit
def _load_rows(
    w_ptr, scales_ptr, numbers, column, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CHECK_K: tl.constexpr
):
    """Columns [column, column + BLOCK_K) of these rows of the weight, zero past its edges: a tuple of one tensor,
    [WARPS, ., BLOCK_K]; of a weight in int8, of its values [WARPS, ., BLOCK_K / 16, 16], and of their scales
    [WARPS, ., BLOCK_K / 16].

    Nothing reads them a second time before all other weights have been read: they are the first to leave the L2 cache.
    """
    INT8: tl.constexpr = scales_ptr is not None
    k = _columns(column, BLOCK_K, INT8)
    rows, real = numbers.to(tl.int64)[:, :, None], (numbers < N)[:, :, None]
    if INT8:
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        first = column + tl.arange(0, BLOCK_K // LOAD)[None, None, :] * LOAD
        scales = tl.load(scales_ptr + rows * GROUPS + first // GROUP, real & (first < K), other=0.0)
        rows, real = rows[:, :, :, None], real[:, :, :, None]
        if CHECK_K:
            real = real & (k < K)
        return (tl.load(w_ptr + rows * K + k, real, other=0, eviction_policy="evict_first"), scales)
    if CHECK_K:
        real = real & (k < K)
    return (tl.load(w_ptr + rows * K + k, real, other=0.0, eviction_policy="evict_first"),)


@triton.jit
def _load_x(x_ptr, row, column, rows, K: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr, INT8: tl.constexpr):
    """Columns [column, column + BLOCK_K) of one row of `x`, or of a norm's weight, for each warp: float32, with one row
    for the weight's, else in the shape that the weight has.

    Each warp reads them for itself, in the layout that the weight has: nothing is exchanged through shared memory.
    """
    k = _columns(column, BLOCK_K, INT8)
    if INT8:
        k += tl.zeros([WARPS, 1, 1, 1], tl.int32)
    else:
        k += tl.zeros([WARPS, 1, 1], tl.int32)
    # The last turn of a loop may reach past K: what lies there times a weight of zero need not be zero.
    return tl.load(x_ptr + row.to(tl.int64) * K + k, (row < rows) & (k < K), other=0.0).to(tl.float32)


@triton.jit
def load_ahead(
    w_ptr,
    scales_ptr,
    sets,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The first columns of a program's rows of the weight, in registers: what `gemv` starts from.

    A tuple of what `_load_rows` gives, ordered by block of BLOCK_K columns, STAGES of them, then by set. To be loaded
    before `wait_for_inputs`.

    Args:
        w_ptr: the weight, [N, K], in int8 if `scales_ptr` is not None.
        scales_ptr: float32 [N, groups of GROUP columns], or None.
    """
    weights = ()
    for stage in tl.static_range(min(STAGES, (K + BLOCK_K - 1) // BLOCK_K)):
        for s in tl.static_range(len(sets)):
            weights = weights + _load_rows(w_ptr, scales_ptr, sets[s], stage * BLOCK_K, N, K, BLOCK_K, K % BLOCK_K != 0)
    return weights


@triton.jit
def gemv(
    x_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,
    weights,
    sets,
    row0,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Products of rows [row0, row0 + ROWS) of `x` [rows, K] and the rows of `w` [N, K] that `sets` names.

    Args:
        norm_ptr: weight of an RMSNorm of `x`, [K], or None.
        w_ptr, scales_ptr: as in `load_ahead`.
        weights: from `load_ahead`; as many columns stay in flight.
        sets: a tuple of what `own_rows` gives.
        BLOCK_K: the width of a warp's 16-byte loads, or more; with a weight in int8 a multiple of 16.

    Returns:
        A tuple of float32 [WARPS, BLOCK_N / WARPS], ordered by set, then by row.
    """
    PER_WARP: tl.constexpr = BLOCK_N // WARPS
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    INT8: tl.constexpr = scales_ptr is not None
    LOADS: tl.constexpr = 2 if INT8 else 1
    WIDTH: tl.constexpr = BLOCK_K // LOAD if INT8 else BLOCK_K
    LOADED: tl.constexpr = len(weights) // (LOADS * len(sets))
    sums, squares = (), ()
    for _ in tl.static_range(len(sets) * ROWS):
        sums = sums + (tl.zeros([WARPS, PER_WARP, WIDTH], tl.float32),)
    for _ in tl.static_range(ROWS):
        squares = squares + (tl.zeros([WARPS, 1, WIDTH], tl.float32),)
    for turn in tl.range((BLOCKS + LOADED - 1) // LOADED, num_stages=1):
        ahead = ()
        for stage in tl.static_range(LOADED):
            column = (turn * LOADED + stage) * BLOCK_K
            xs, squared = (), ()
            for m in tl.static_range(ROWS):
                x = _load_x(x_ptr, row0 + m, column, rows, K, WARPS, BLOCK_K, INT8)
                if norm_ptr is not None:
                    squared = squared + (squares[m] + (tl.sum(x * x, 3) if INT8 else x * x),)
                    x *= _load_x(norm_ptr, row0 * 0, column, 1, K, WARPS, BLOCK_K, INT8)
                xs = xs + (x,)
            if norm_ptr is not None:
                squares = squared
            added = ()
            for s in tl.static_range(len(sets)):
                at: tl.constexpr = (stage * len(sets) + s) * LOADS
                w = weights[at].to(tl.float32)
                for m in tl.static_range(ROWS):
                    product = w * xs[m]
                    if INT8:
                        product = tl.sum(product, 3) * weights[at + 1]
                    added = added + (sums[s * ROWS + m] + product,)
            sums = added
            if LOADED < BLOCKS:
                next_column = column + LOADED * BLOCK_K
                for s in tl.static_range(len(sets)):
                    ahead = ahead + _load_rows(w_ptr, scales_ptr, sets[s], next_column, N, K, BLOCK_K, True)
        if LOADED < BLOCKS:
            weights = ahead
    products = ()
    for s in tl.static_range(len(sets)):
        for m in tl.static_range(ROWS):
            total = tl.sum(sums[s * ROWS + m], 2)
            if norm_ptr is not None:
                total *= tl.rsqrt(tl.sum(squares[m], 2) / K + eps)
            products = products + (total,)
    return products
