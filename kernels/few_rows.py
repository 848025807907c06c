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
def _load_rows(w_ptr, numbers, column, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CHECK_K: tl.constexpr):
    """Columns [column, column + BLOCK_K) of these rows of the weight, zero past its edges: [WARPS, ., BLOCK_K].

    Nothing reads them a second time before all other weights have been read: they are the first to leave the L2 cache.
    """
    k = column + tl.arange(0, BLOCK_K)[None, None, :]
    at = w_ptr + numbers.to(tl.int64)[:, :, None] * K + k
    if CHECK_K:
        return tl.load(at, (numbers < N)[:, :, None] & (k < K), other=0.0, eviction_policy="evict_first")
    return tl.load(at, (numbers < N)[:, :, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_x(x_ptr, row, column, rows, K: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns [column, column + BLOCK_K) of one row of `x`, or of a norm's weight, for each warp: [WARPS, 1, BLOCK_K].

    Each warp reads them for itself, in the layout that the weight has: nothing is exchanged through shared memory.
    """
    k = column + tl.arange(0, BLOCK_K)[None, None, :] + tl.zeros([WARPS, 1, 1], tl.int32)
    # The last turn of a loop may reach past K: what lies there times a weight of zero need not be zero.
    return tl.load(x_ptr + row.to(tl.int64) * K + k, (row < rows) & (k < K), other=0.0)


@triton.jit
def load_ahead(
    w_ptr,
    sets,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The first columns of a program's rows of the weight, in registers: what `gemv` starts from.

    A tuple ordered by block of BLOCK_K columns, STAGES of them, then by set. To be loaded before `wait_for_inputs`.
    """
    weights = ()
    for stage in tl.static_range(min(STAGES, (K + BLOCK_K - 1) // BLOCK_K)):
        for s in tl.static_range(len(sets)):
            weights = weights + (_load_rows(w_ptr, sets[s], stage * BLOCK_K, N, K, BLOCK_K, K % BLOCK_K != 0),)
    return weights


@triton.jit
def gemv(
    x_ptr,
    norm_ptr,
    w_ptr,
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
        weights: from `load_ahead`; as many columns stay in flight.
        sets: a tuple of what `own_rows` gives.
        BLOCK_K: the width of a warp's 16-byte loads, or more.

    Returns:
        A tuple of float32 [WARPS, BLOCK_N / WARPS], ordered by set, then by row.
    """
    PER_WARP: tl.constexpr = BLOCK_N // WARPS
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    LOADED: tl.constexpr = len(weights) // len(sets)
    sums, squares = (), ()
    for _ in tl.static_range(len(sets) * ROWS):
        sums = sums + (tl.zeros([WARPS, PER_WARP, BLOCK_K], tl.float32),)
    for _ in tl.static_range(ROWS):
        squares = squares + (tl.zeros([WARPS, 1, BLOCK_K], tl.float32),)
    for turn in tl.range((BLOCKS + LOADED - 1) // LOADED, num_stages=1):
        ahead = ()
        for stage in tl.static_range(LOADED):
            column = (turn * LOADED + stage) * BLOCK_K
            xs, squared = (), ()
            for m in tl.static_range(ROWS):
                x = _load_x(x_ptr, row0 + m, column, rows, K, WARPS, BLOCK_K).to(tl.float32)
                if norm_ptr is not None:
                    squared = squared + (squares[m] + x * x,)
                    x *= _load_x(norm_ptr, row0 * 0, column, 1, K, WARPS, BLOCK_K).to(tl.float32)
                xs = xs + (x,)
            if norm_ptr is not None:
                squares = squared
            added = ()
            for s in tl.static_range(len(sets)):
                w = weights[stage * len(sets) + s].to(tl.float32)
                for m in tl.static_range(ROWS):
                    added = added + (sums[s * ROWS + m] + w * xs[m],)
            sums = added
            if LOADED < BLOCKS:
                next_column = column + LOADED * BLOCK_K
                for s in tl.static_range(len(sets)):
                    ahead = ahead + (_load_rows(w_ptr, sets[s], next_column, N, K, BLOCK_K, True),)
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
