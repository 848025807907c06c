"""The choice of a token, device code: three kernels, one after another.

`scan` looks at every logit once and leaves the maximum and the mass of each chunk of CHUNK tokens. `bound` finds, one
program a row, from where on tokens are kept: the chunks' maxima name the few chunks that matter, and only these are
searched. `draw` adds the noise to what is kept and takes the largest.

Scores are compared as integers in the same order (`_key`), so that a bound is found exactly, by cutting the range of
integers in PIVOTS parts again and again. Mass is exp(score - largest) in units of 2^-40, an integer too: sums of it do
not depend on their order.

What matters is in one block of BLOCK chunks as a rule, held in registers through a search. More of it (a large top_k,
or a top_p of a flat distribution) is read again in every turn.
"""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import arrive_last, wait_for_inputs

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
"""Below the key of every number."""

BY_COUNT: tl.constexpr = tl.constexpr(0)
BY_MASS: tl.constexpr = tl.constexpr(1)
BY_ID: tl.constexpr = tl.constexpr(2)
"""What `_above` adds up: tokens, or their mass, over a key; or tokens of one key over an id."""


@triton.jit
def _key(x):
    """int32, in the order of the float32 numbers; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(x, at, real, seen_ptr, inverse, penalty, inverse_penalty):
    """A logit once penalised and divided by the temperature; one that is not real, or NaN, is -inf."""
    x = tl.where(real & (x == x), x, float("-inf"))
    if penalty != 1.0:
        seen = tl.load(seen_ptr + at, real, other=0)
        x = tl.where(seen != 0, x * tl.where(x < 0, penalty, inverse_penalty), x)
    return x * inverse


@triton.jit
def _mass(x, top):
    return (tl.exp(x - top) * 1099511627776.0).to(tl.int64)


@triton.jit
def _shape(shape_ptr, row, ROWS):
    """One over the temperature, the penalty, and one over it, float32; and whether the row is greedy."""
    temperature = tl.load(shape_ptr + row)
    penalty = tl.load(shape_ptr + 3 * ROWS + row)
    inverse = 1.0 / tl.where(temperature > 0, temperature, 1.0)
    return inverse.to(tl.float32), penalty.to(tl.float32), (1.0 / penalty).to(tl.float32), temperature == 0


@triton.jit(do_not_specialize=["ROWS"])
def scan(
    logits_ptr,
    shape_ptr,
    seen_ptr,
    maxima_ptr,
    sums_ptr,
    top_ids_ptr,
    finite_ptr,
    ROWS,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program per BLOCK chunks of a row: their maxima and their sums of exp(score - maximum), float32 [rows, CHUNKS];
    the id of the largest of all, and whether all are finite, int32 [rows, PARTS].
    """
    wait_for_inputs(USE_PDL)
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    inverse, penalty, inverse_penalty, _ = _shape(shape_ptr, row, ROWS)
    chunk = part * BLOCK + tl.arange(0, BLOCK)
    n = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    real = n < VOCAB
    x = tl.load(logits_ptr + row * VOCAB + n, real, other=0.0)
    broken = (x != x) | (tl.abs(x) == float("inf"))
    x = _score(x, row * VOCAB + n, real, seen_ptr, inverse, penalty, inverse_penalty)
    maxima = tl.max(x, 1)
    base = tl.where(tl.abs(maxima) == float("inf"), 0.0, maxima)
    sums = tl.sum(tl.exp(x - base[:, None]), 1)
    tl.store(maxima_ptr + row * CHUNKS + chunk, maxima, chunk < CHUNKS)
    tl.store(sums_ptr + row * CHUNKS + chunk, sums, chunk < CHUNKS)
    best = tl.where(real & (x == tl.max(maxima, 0)), n, VOCAB)
    tl.store(top_ids_ptr + row * PARTS + part, tl.min(tl.min(best, 1), 0))
    tl.store(finite_ptr + row * PARTS + part, 1 - tl.max(tl.max(broken.to(tl.int32), 1), 0))


@triton.jit
def _pivots(low, high, PIVOTS: tl.constexpr):
    """Numbers that cut [low, high] into PIVOTS parts, int32, ascending from `low`; low and high are int64."""
    return (low + (high - low) * tl.arange(0, PIVOTS) // PIVOTS).to(tl.int32)


@triton.jit
def _narrow(sums, low, high, target, PIVOTS: tl.constexpr):
    """The part that holds the least number with a sum above it of less than `target`, given the sums above pivots."""
    missed = tl.sum((sums >= target).to(tl.int64), 0)  # of the first pivots: sums fall
    spread = high - low
    above_missed = low + spread * (missed - 1) // PIVOTS + 1
    return tl.where(missed > 0, above_missed, low), tl.where(missed < PIVOTS, low + spread * missed // PIVOTS, high)


@triton.jit
def _above_held(keys, weights, pivots):
    return tl.sum(tl.where(keys[None, :] > pivots[:, None], weights[None, :], 0), 1)


@triton.jit
def _search_held(keys, weights, low, high, target, PIVOTS: tl.constexpr):
    """The least number from `low` to `high` such that the weights of the keys above it add up to less than `target`."""
    while low < high:
        low, high = _narrow(_above_held(keys, weights, _pivots(low, high, PIVOTS)), low, high, target, PIVOTS)
    return low


@triton.jit
def _weigh(
    mode: tl.constexpr,
    limit,
    top,
    first,
    row,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys and weights of a block of the listed chunks, from the `first` of them on; `mode` says what they are. `limit`
    is the key of BY_ID.
    """
    list_ptr, listed, logits_ptr, seen_ptr, start, inverse, penalty, inverse_penalty = row
    place = first + tl.arange(0, BLOCK * CHUNK) // CHUNK
    n = tl.load(list_ptr + place, place < listed, other=0) * CHUNK + tl.arange(0, BLOCK * CHUNK) % CHUNK
    real = (place < listed) & (n < VOCAB)
    x = tl.load(logits_ptr + start + n, real, other=0.0)
    x = _score(x, start + n, real, seen_ptr, inverse, penalty, inverse_penalty)
    key = _key(x)
    if mode == BY_ID:
        key = tl.where(key == limit, n, -1)
    key = tl.where(real, key, LOWEST)
    return key, _mass(x, top) if mode == BY_MASS else tl.full([BLOCK * CHUNK], 1, tl.int32)


@triton.jit
def _above(
    mode: tl.constexpr,
    pivots,
    limit,
    top,
    row,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """What lies above each pivot in the listed chunks, int32 [PIVOTS], int64 by mass; arguments as in `_weigh`."""
    if mode == BY_MASS:
        sums = tl.zeros([PIVOTS, BLOCK * CHUNK], tl.int64)
    else:
        sums = tl.zeros([PIVOTS, BLOCK * CHUNK], tl.int32)
    for first in range(0, row[1], BLOCK):
        keys, weights = _weigh(mode, limit, top, first, row, VOCAB, CHUNK, BLOCK)
        sums += tl.where(keys[None, :] > pivots[:, None], weights[None, :], 0)
    return tl.sum(sums, 1)


@triton.jit
def _search(
    mode: tl.constexpr,
    low,
    high,
    target,
    limit,
    top,
    row,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """As `_search_held`, of the listed chunks; arguments as in `_weigh`."""
    if row[1] <= BLOCK:
        keys, weights = _weigh(mode, limit, top, 0, row, VOCAB, CHUNK, BLOCK)
        low = _search_held(keys, weights, low, high, target, PIVOTS)
    else:
        while low < high:
            sums = _above(mode, _pivots(low, high, PIVOTS), limit, top, row, VOCAB, CHUNK, BLOCK, PIVOTS)
            low, high = _narrow(sums, low, high, target, PIVOTS)
    return low


@triton.jit(do_not_specialize=["ROWS"])
def bound(
    logits_ptr,
    shape_ptr,
    draws_ptr,
    seen_ptr,
    maxima_ptr,
    sums_ptr,
    top_ids_ptr,
    finite_ptr,
    lists_ptr,
    tops_ptr,
    bounds_ptr,
    ROWS,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program per row. tops: the largest score, float32 [rows]. bounds, int32 [4, rows]: the key from which on tokens
    are kept, the id from which on those of just that key are, the id of the largest score, whether all are finite.
    lists: int32 [rows, CHUNKS], room for the chunks that matter.
    """
    wait_for_inputs(USE_PDL)
    own = tl.program_id(0).to(tl.int64)
    start = own * VOCAB
    inverse, penalty, inverse_penalty, greedy = _shape(shape_ptr, own, ROWS)
    top_p = tl.load(shape_ptr + ROWS + own)
    top_k = tl.load(draws_ptr + own)
    c = tl.arange(0, CHUNKS_BLOCK)
    maxima = tl.load(maxima_ptr + own * CHUNKS + c, c < CHUNKS, other=float("-inf"))
    top = tl.max(maxima, 0)
    p = tl.arange(0, PARTS_BLOCK)
    top_ids = tl.load(top_ids_ptr + own * PARTS + p, p < PARTS, other=VOCAB)
    # A part's id is that of its own largest score: the row's stands first among those of the same score.
    at = start + tl.minimum(top_ids, VOCAB - 1)
    their = _score(tl.load(logits_ptr + at), at, top_ids < VOCAB, seen_ptr, inverse, penalty, inverse_penalty)
    best = tl.min(tl.where(their == top, top_ids, VOCAB), 0)
    finite = tl.min(tl.load(finite_ptr + own * PARTS + p, p < PARTS, other=1), 0)
    limit = tl.full([], LOWEST, tl.int64)
    cut = tl.full([], 0, tl.int64)
    if (finite == 1) & (~greedy) & ((top_k > 0) | (top_p < 1.0)):
        keys = tl.where(c < CHUNKS, _key(maxima), LOWEST)
        highest = tl.max(keys, 0).to(tl.int64)
        lowest = tl.min(tl.where(c < CHUNKS, keys, 0x7FFFFFFF), 0).to(tl.int64)
        sums = tl.load(sums_ptr + own * CHUNKS + c, c < CHUNKS, other=0.0)
        masses = (sums * tl.exp(maxima - top) * 1099511627776.0).to(tl.int64)
        total = tl.sum(masses, 0)
        list_ptr = lists_ptr + own * CHUNKS
        if top_k > 0:
            # As many chunks reach the k-th largest maximum, so as many tokens do: none below it is kept.
            guess = _search_held(keys, tl.where(c < CHUNKS, 1, 0), lowest, highest, top_k, PIVOTS)
        else:
            # Chunks that hold more than top_p of the mass; whether what they keep does is seen below.
            most = ((1.0 + top_p) * 0.5 * total.to(tl.float64)).to(tl.int64)
            guess = _search_held(keys, masses, lowest, highest, most, PIVOTS)
        wanted = (keys >= guess) & (c < CHUNKS)
        listed = tl.sum(wanted.to(tl.int32), 0)
        tl.store(list_ptr + tl.cumsum(wanted.to(tl.int32), 0) - 1, c, wanted)
        tl.debug_barrier()
        guess = tl.where(listed == CHUNKS, LOWEST, guess)
        limit = guess
        row = (list_ptr, listed, logits_ptr, seen_ptr, start, inverse, penalty, inverse_penalty)
        if top_k > 0:
            limit = _search(BY_COUNT, guess, highest, top_k, 0, top, row, VOCAB, CHUNK, BLOCK, PIVOTS)
        if top_p < 1.0:
            below = tl.maximum(limit - 1, LOWEST).to(tl.int32) + tl.zeros([PIVOTS], tl.int32)
            held = tl.max(_above(BY_MASS, below, 0, top, row, VOCAB, CHUNK, BLOCK, PIVOTS), 0)
            if top_k > 0:
                total = held
            target = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
            if held < target:  # what lies below the guess is needed too
                limit = tl.full([], LOWEST, tl.int64)
                listed = tl.full([], CHUNKS, tl.int32)
                tl.debug_barrier()
                tl.store(list_ptr + c, c, c < CHUNKS)
                tl.debug_barrier()
            row = (list_ptr, listed, logits_ptr, seen_ptr, start, inverse, penalty, inverse_penalty)
            limit = _search(BY_MASS, limit, highest, target, 0, top, row, VOCAB, CHUNK, BLOCK, PIVOTS)
            # Of the tokens at the bound as many are kept as reach the sum, those of the highest ids.
            at_limit = limit.to(tl.int32)
            around = tl.maximum(limit - tl.where(tl.arange(0, PIVOTS) == 0, 1, 0), LOWEST).to(tl.int32)
            over = _above(BY_MASS, around, 0, top, row, VOCAB, CHUNK, BLOCK, PIVOTS)
            with_equals, without = tl.max(over, 0), tl.min(over, 0)
            bits = at_limit ^ ((at_limit >> 31) & 0x7FFFFFFF)
            each = tl.maximum(_mass(bits.to(tl.float32, bitcast=True), top), 1)
            equals = (target - without + each - 1) // each
            if equals * each < with_equals - without:
                last = tl.full([], VOCAB - 1, tl.int64)
                cut = _search(BY_ID, cut, last, equals, at_limit, top, row, VOCAB, CHUNK, BLOCK, PIVOTS)
    tl.store(tops_ptr + own, top)
    tl.store(bounds_ptr + own, limit.to(tl.int32))
    tl.store(bounds_ptr + ROWS + own, cut.to(tl.int32))
    tl.store(bounds_ptr + 2 * ROWS + own, tl.minimum(best, VOCAB - 1))
    tl.store(bounds_ptr + 3 * ROWS + own, finite)


@triton.jit
def _noise(seed, step, first, COUNT: tl.constexpr):
    """-log of exponential numbers for the ids from `first` on, a function of seed, step and id: float32 [COUNT]. See
    `reference.exponential`.
    """
    counter = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = counter * 0
    step_low, step_high = (step & 0xFFFFFFFF).to(tl.uint32), (step >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, zero + step_low, zero + step_high, zero)
    word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [COUNT])  # in the order a, b, c, d
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(u < 0.01, u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25))), -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["ROWS", "finite_at"])
def draw(
    logits_ptr,
    shape_ptr,
    draws_ptr,
    seen_ptr,
    maxima_ptr,
    tops_ptr,
    bounds_ptr,
    part_bests_ptr,
    part_ids_ptr,
    counters_ptr,
    out_ptr,
    finite_at,
    ROWS,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """PARTS programs a row find the best of BLOCK chunks each; the last to arrive, the best of those. A greedy row's is
    known already. part_bests, part_ids: [rows, PARTS]; out: int64, ids, and `finite_at` behind them whether rows are
    finite.
    """
    wait_for_inputs(USE_PDL)
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    inverse, penalty, inverse_penalty, greedy = _shape(shape_ptr, row, ROWS)
    finite = tl.load(bounds_ptr + 3 * ROWS + row)
    best_id = tl.load(bounds_ptr + 2 * ROWS + row)
    step = tl.load(draws_ptr + 2 * ROWS + row)
    decided = part == 0
    if (finite == 1) & (~greedy):
        top, limit = tl.load(tops_ptr + row), tl.load(bounds_ptr + row)
        chunk = part * BLOCK + tl.arange(0, BLOCK)
        maxima = tl.load(maxima_ptr + row * CHUNKS + chunk, chunk < CHUNKS, other=float("-inf"))
        best = tl.full([], float("-inf"), tl.float32)
        own = tl.full([], VOCAB, tl.int32)
        if tl.max(_key(maxima), 0) >= limit:
            min_p = tl.load(shape_ptr + 2 * ROWS + row).to(tl.float32)
            cut, seed = tl.load(bounds_ptr + ROWS + row), tl.load(draws_ptr + ROWS + row)
            n = part * BLOCK * CHUNK + tl.arange(0, BLOCK * CHUNK)
            real = n < VOCAB
            x = tl.load(logits_ptr + row * VOCAB + n, real, other=0.0)
            x = _score(x, row * VOCAB + n, real, seen_ptr, inverse, penalty, inverse_penalty)
            key = _key(x)
            kept = real & ((key > limit) | ((key == limit) & (n >= cut))) & (tl.exp(x - top) >= min_p)
            x = tl.where(kept, (x - top) + _noise(seed, step, part * BLOCK * CHUNK, BLOCK * CHUNK), float("-inf"))
            best = tl.max(x, 0)
            own = tl.min(tl.where(kept & (x == best), n, VOCAB), 0)
        tl.store(part_bests_ptr + row * PARTS + part, best)
        tl.store(part_ids_ptr + row * PARTS + part, own)
        decided = arrive_last(counters_ptr + row, PARTS)
        if decided:
            p = tl.arange(0, PARTS_BLOCK)
            bests = tl.load(part_bests_ptr + row * PARTS + p, p < PARTS, other=float("-inf"), cache_modifier=".cg")
            ids = tl.load(part_ids_ptr + row * PARTS + p, p < PARTS, other=VOCAB, cache_modifier=".cg")
            best_id = tl.minimum(tl.min(tl.where(bests == tl.max(bests, 0), ids, VOCAB), 0), VOCAB - 1)
    if decided:
        tl.store(out_ptr + row, best_id.to(tl.int64))
        tl.store(out_ptr + finite_at + row, finite.to(tl.int64))
        tl.store(draws_ptr + 2 * ROWS + row, step + 1)
        if penalty != 1.0:
            tl.store(seen_ptr + row * VOCAB + best_id, 1)
