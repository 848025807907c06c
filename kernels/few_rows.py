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
"""Numbers of a weight in int8 that one thread loads at once. Of `x`, in 16 bits, it loads half as many."""


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
def _load_rows(
    w_ptr, scales_ptr, numbers, column, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CHECK_K: tl.constexpr
):
    """Columns [column, column + BLOCK_K) of these rows of the weight, zero past its edges: a tuple of one tensor,
    [WARPS, ., BLOCK_K]; of a weight in int8, of its values, four in a word, int32 [WARPS, ., BLOCK_K / 4], and of the
    scales of LOAD columns each, [WARPS, ., BLOCK_K / LOAD]. Words, because a number of a tensor takes a register.

    Nothing reads them a second time before all other weights have been read: they are the first to leave the L2 cache.
    """
    rows, real = numbers.to(tl.int64)[:, :, None], (numbers < N)[:, :, None]
    if scales_ptr is not None:
        tl.static_assert(K % 4 == 0)
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        first = column + tl.arange(0, BLOCK_K // LOAD)[None, None, :] * LOAD
        scales = tl.load(scales_ptr + rows * GROUPS + first // GROUP, real & (first < K), other=0.0)
        words_ptr, word = w_ptr.to(tl.pointer_type(tl.int32)), column // 4 + tl.arange(0, BLOCK_K // 4)[None, None, :]
        if CHECK_K:
            real = real & (word < K // 4)
        loaded = (tl.load(words_ptr + rows * (K // 4) + word, real, other=0, eviction_policy="evict_first"), scales)
    else:
        k = column + tl.arange(0, BLOCK_K)[None, None, :]
        if CHECK_K:
            real = real & (k < K)
        loaded = (tl.load(w_ptr + rows * K + k, real, other=0.0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _load_x(x_ptr, row, column, rows, K: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr, INT8: tl.constexpr):
    """Columns [column, column + BLOCK_K) of one row of `x`, or of a norm's weight, for each warp: a tuple of float32
    [WARPS, 1, BLOCK_K]; with a weight in int8 of the first and the second half of each LOAD columns,
    [WARPS, 1, BLOCK_K / 2].

    Each warp reads them for itself, in the layout that the weight has: nothing is exchanged through shared memory.
    """
    if INT8:
        at = tl.arange(0, BLOCK_K // 2)[None, None, :]
        k = column + at // (LOAD // 2) * LOAD + at % (LOAD // 2)
        loaded = (
            _load_columns(x_ptr, row, k, rows, K, WARPS),
            _load_columns(x_ptr, row, k + LOAD // 2, rows, K, WARPS),
        )
    else:
        k = column + tl.arange(0, BLOCK_K)[None, None, :]
        loaded = (_load_columns(x_ptr, row, k, rows, K, WARPS),)
    return loaded


@triton.jit
def _load_columns(x_ptr, row, k, rows, K: tl.constexpr, WARPS: tl.constexpr):
    k += tl.zeros([WARPS, 1, 1], tl.int32)
    # The last turn of a loop may reach past K: what lies there times a weight of zero need not be zero.
    return tl.load(x_ptr + row.to(tl.int64) * K + k, (row < rows) & (k < K), other=0.0).to(tl.float32)


@triton.jit
def _floats(words, zero):
    """The bytes of words as numbers, signed: int32 [., ., words] to a tuple of the first and the second half of each
    LOAD of them, float32 [., ., 2 * words]. `zero` is 0, which the compiler must not know."""
    halves = words.reshape(words.shape[0], words.shape[1], words.shape[2] // 4, 2, 2).permute(0, 1, 2, 4, 3)
    first, second = tl.split(halves)
    return _half(first, zero), _half(second, zero)


@triton.jit
def _half(words, zero):
    """Bytes as numbers, signed: int32 [., ., ., 2] to float32 [., ., . * 8].

    A GPU converts integers slowly. Here a byte, made 128 greater, becomes the lowest of the float 2**23, or the second
    of 2**15: there its bits count ones. That is one instruction if the float is in a register.
    """
    low = words ^ -0x7F7F7F80
    high, first_float, second_float = low >> 16, zero + 0x4B000000, zero + 0x47000000
    first, third = _as_float((low & 0xFF) | first_float), _as_float((high & 0xFF) | first_float)
    second, fourth = _as_float((low & 0xFF00) | second_float), _as_float((high & 0xFF00) | second_float)
    even = tl.join(first - 8388736.0, third - 8388736.0)  # 2**23 + 128
    odd = tl.join(second - 32896.0, fourth - 32896.0)  # 2**15 + 128
    return tl.join(even, odd).reshape(words.shape[0], words.shape[1], words.shape[2] * 8)


@triton.jit
def _as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sum_loads(product):
    """Sums of LOAD / 2 neighbours, which one thread holds: [., ., size] to [., ., size / (LOAD / 2)]."""
    HALF: tl.constexpr = LOAD // 2
    return tl.sum(product.reshape(product.shape[0], product.shape[1], product.shape[2] // HALF, HALF), 3)


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
        BLOCK_K: the width of a warp's 16-byte loads, or more; with a weight in int8 a multiple of `LOAD`.

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
        squares = squares + (tl.zeros([WARPS, 1, BLOCK_K // 2 if INT8 else BLOCK_K], tl.float32),)
    for turn in tl.range((BLOCKS + LOADED - 1) // LOADED, num_stages=1):
        ahead = ()
        for stage in tl.static_range(LOADED):
            column = (turn * LOADED + stage) * BLOCK_K
            xs, squared = (), ()
            for m in tl.static_range(ROWS):
                x = _load_x(x_ptr, row0 + m, column, rows, K, WARPS, BLOCK_K, INT8)
                if norm_ptr is not None:
                    norm = _load_x(norm_ptr, row0 * 0, column, 1, K, WARPS, BLOCK_K, INT8)
                    square, normed = squares[m], ()
                    for half in tl.static_range(len(x)):
                        square += x[half] * x[half]
                        normed = normed + (x[half] * norm[half],)
                    squared, x = squared + (square,), normed
                xs = xs + (x,)
            if norm_ptr is not None:
                squares = squared
            added = ()
            for s in tl.static_range(len(sets)):
                if INT8:
                    low, high = _floats(weights[(stage * len(sets) + s) * 2], rows >> 31)
                    for m in tl.static_range(ROWS):
                        product = _sum_loads(low * xs[m][0] + high * xs[m][1])
                        added = added + (sums[s * ROWS + m] + product * weights[(stage * len(sets) + s) * 2 + 1],)
                else:
                    w = weights[stage * len(sets) + s].to(tl.float32)
                    for m in tl.static_range(ROWS):
                        added = added + (sums[s * ROWS + m] + w * xs[m][0],)
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
