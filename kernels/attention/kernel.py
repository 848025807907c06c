"""Cascade attention on the GPU: device code. `tables.py` says what the tables hold, `launch.py` starts it.

A work unit is an item and a KV head. Its rows, times the query heads of that KV head, are the M of its products; it
walks its spans page by page, BLOCK_N of a page's keys at a time, turning its queries anew for each span, and leaves one
partial result per row, or the whole result where an item holds all that its rows see. LSEs are base 2. Partials are
merged in their order, so that a replay gives the same bits.
"""

import triton
import triton.language as tl

LISTED: tl.constexpr = tl.constexpr(32)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

TABLES = ("items", "spans", "rows", "frames", "pages", "changes", "counts", "merges")
"""They lie one behind the other, each wherever the one before it ends: that must not decide which kernel is compiled.
No load from them is wider for being aligned."""


@triton.jit
def _unit(
    item, head, first_unit, queries, kv, values_at, positions, cosines, sines, items, spans, rows, frames, pages,
    changes, partials, lses, out, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DIRECT: tl.constexpr, SHARED: tl.constexpr, HIDES: tl.constexpr, SHIFTS: tl.constexpr, FOLLOWED: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """One item, one KV head.

    A segment's shift (mu, nu) adds q.mu to each of its scores, and nu to each of its values. So while its keys are
    walked, `top` is less by q.mu, and `mixed` by nu for each unit of `total`: the loop over keys knows nothing of it.
    Only loads depend on whether there is a shift: if `mixed` were written in a branch, the compiler would let every
    product on tensor cores wait for the one before.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    PADDED: tl.constexpr = BLOCK_D != HEAD_DIM
    BLOCKS: tl.constexpr = PAGE // BLOCK_N
    q_heads: tl.constexpr = KV_HEADS * GROUP
    first_row = tl.load(items + item * 6)
    row_count = tl.load(items + item * 6 + 1)
    first_span = tl.load(items + item * 6 + 2)
    last_span = tl.load(items + item * 6 + 3)

    m = tl.arange(0, BLOCK_M)
    member = m // GROUP
    live = member < row_count
    q_head = head * GROUP + m % GROUP
    if DIRECT:
        row = first_row + member
    else:
        row = tl.load(rows + (first_row + member) * 2, mask=live, other=0)
        place = tl.load(rows + (first_row + member) * 2 + 1, mask=live, other=0) + tl.load(items + item * 6 + 4)
    position = tl.load(positions + row, mask=live, other=-1).to(tl.int32)

    half = tl.arange(0, BLOCK_D // 2)
    half_live = _both(live[:, None], (half < HALF)[None, :], PADDED)
    query_at = queries + (row.to(tl.int64) * q_heads + q_head)[:, None] * HEAD_DIM + half[None, :]

    d = tl.arange(0, BLOCK_D)
    d_real = d % (BLOCK_D // 2) < HALF
    if PADDED:  # each half by itself, as queries are turned
        d = d // (BLOCK_D // 2) * HALF + d % (BLOCK_D // 2)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, LISTED)
    if (HIDES or SHIFTS) and not SHARED:
        some_changed = tl.load(items + item * 6 + 5) > 0
    for span in range(first_span, last_span):
        listed_page = tl.load(spans + span * 4)
        offset = listed_page % PAGE
        span_start = tl.load(spans + span * 4 + 1)
        span_stop = tl.load(spans + span * 4 + 2)
        frame_at = tl.load(spans + span * 4 + 3)
        if SHARED:
            frame = frames + (-1 - frame_at) * 4
            origin = tl.load(frame)
            low = tl.load(frame + 1)
            high = tl.load(frame + 2)
            change = tl.load(frame + 3)
            changed = change >= 0
            seen = tl.where(live, tl.minimum(high, position - origin + offset + 1), low)
            start = tl.maximum(low, span_start)
        else:
            frame = frames + tl.where(frame_at < 0, -1 - frame_at, frame_at + member) * 4
            origin = tl.load(frame, mask=live, other=0)
            low = tl.load(frame + 1, mask=live, other=2147483647)
            high = tl.load(frame + 2, mask=live, other=0)
            change = tl.load(frame + 3, mask=live, other=-1)
            if HIDES or SHIFTS:
                changed = some_changed
            seen = tl.where(live, tl.minimum(high, position - origin + offset + 1), 0)
            start = tl.maximum(tl.min(low, 0), span_start)
        stop = tl.minimum(tl.max(seen, 0), span_stop)
        turn = tl.maximum(position - origin, 0).to(tl.int64)[:, None] * HALF + half[None, :]
        cosine = tl.load(cosines + turn, mask=half_live, other=0.0) * (scale * LOG2_E)
        sine = tl.load(sines + turn, mask=half_live, other=0.0) * (scale * LOG2_E)
        # Page ids in registers: loaded one by one they would be a step of the loop's pipeline.
        listed = pages + listed_page // PAGE - span_start // PAGE
        first = start // PAGE
        ids = tl.load(listed + first + k, mask=(first + k) * PAGE < stop, other=0)
        if HIDES and SHARED:
            bits = _hidden(changes, change, first + k, stop, PAGE)
        if USE_PDL and first_unit and span == first_span:
            # All read so far was there before the kernels ahead of this one began.
            tl.extra.cuda.gdc_wait()
            if FOLLOWED:
                tl.extra.cuda.gdc_launch_dependents()
        if stop > start:
            # Read anew for each span, from the cache: kept, they would take the registers that the loop needs.
            query_a = tl.load(query_at, mask=half_live, other=0.0).to(tl.float32)
            query_b = tl.load(query_at + HALF, mask=half_live, other=0.0).to(tl.float32)
            halves = tl.join(query_a * cosine - query_b * sine, query_b * cosine + query_a * sine)
            turned = tl.reshape(tl.permute(halves, (0, 2, 1)), (BLOCK_M, BLOCK_D)).to(kv.dtype.element_ty)
            if SHIFTS:
                moved = tl.zeros([BLOCK_M], tl.float32)
                nu = tl.zeros([1 if SHARED else BLOCK_M, BLOCK_D], tl.float32)
                if changed:
                    shift, there = _shift(kv, changes, change, head, d, d_real, KV_HEADS, HEAD_DIM, PAGE, SHARED)
                    mu = tl.load(shift, mask=there, other=0.0).to(tl.float32)
                    nu = tl.load(shift + values_at, mask=there, other=0.0).to(tl.float32)
                    moved = tl.sum(turned.to(tl.float32) * mu, 1)
                top -= moved
                mixed -= total[:, None] * nu
            for some in range(first, (stop + PAGE - 1) // PAGE, LISTED):
                if some > first:
                    ids = tl.load(listed + some + k, mask=(some + k) * PAGE < stop, other=0)
                    if HIDES and SHARED:
                        bits = _hidden(changes, change, some + k, stop, PAGE)
                blocks = tl.minimum((stop + BLOCK_N - 1) // BLOCK_N - some * BLOCKS, LISTED * BLOCKS)
                for index in tl.range(0, blocks, num_stages=STAGES):
                    page = tl.sum(tl.where(k == index // BLOCKS, ids, 0), 0).to(tl.int64)
                    token = (some * BLOCKS + index) * BLOCK_N + n
                    inside = (token >= start) & (token < stop)
                    inner = (index % BLOCKS * BLOCK_N + n) * HEAD_DIM
                    tile = kv + (page * KV_HEADS + head) * (PAGE * HEAD_DIM) + inner[:, None] + d[None, :]
                    stored = _both(inside[:, None], d_real[None, :], PADDED)
                    key = tl.load(tile, mask=stored, other=0.0)
                    score = tl.dot(turned, tl.trans(key), input_precision="ieee")
                    visible = token[None, :] < seen[:, None]
                    if SHARED:
                        visible &= (token >= start)[None, :]
                    else:
                        visible &= token[None, :] >= low[:, None]
                    if HIDES and SHARED:
                        bit = tl.sum(tl.where(k == index // BLOCKS, bits, 0), 0) >> (token % PAGE)
                        visible &= (bit & 1)[None, :] == 0
                    elif HIDES and changed:
                        word = tl.load(
                            changes + change[:, None] + (token // 32)[None, :],
                            mask=inside[None, :] & (change >= 0)[:, None],
                            other=0,
                        )
                        visible &= ((word >> (token % 32)[None, :]) & 1) == 0
                    score = tl.where(visible, score, float("-inf"))
                    new_top = tl.maximum(top, tl.max(score, 1))
                    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
                    weight = tl.exp2(score - finite_top[:, None])
                    decay = tl.exp2(top - finite_top)
                    total = total * decay + tl.sum(weight, 1)
                    mixed = mixed * decay[:, None]
                    value = tl.load(tile + values_at, mask=stored, other=0.0)
                    mixed = tl.dot(weight.to(value.dtype), value, mixed, input_precision="ieee")
                    top = new_top
            if SHIFTS:
                nu = tl.zeros([1 if SHARED else BLOCK_M, BLOCK_D], tl.float32)  # loaded anew: kept, it takes registers
                if changed:
                    shift, there = _shift(kv, changes, change, head, d, d_real, KV_HEADS, HEAD_DIM, PAGE, SHARED)
                    nu = tl.load(shift + values_at, mask=there, other=0.0).to(tl.float32)
                top += moved
                mixed += total[:, None] * nu

    divisor = tl.where(total == 0.0, 1.0, total)
    mixed = mixed / divisor[:, None]
    all_live = _both(live[:, None], d_real[None, :], PADDED)
    if DIRECT:
        at = (row.to(tl.int64) * q_heads + q_head)[:, None] * HEAD_DIM + d[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=all_live)
    else:
        at = place.to(tl.int64) * q_heads + q_head
        tl.store(partials + at[:, None] * HEAD_DIM + d[None, :], mixed, mask=all_live)
        tl.store(lses + at, tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor)), mask=live)


@triton.jit
def _shift(
    kv, changes, change, head, d, d_real,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Where the key of each row's shift is, or of the one that rows share, and whether there is one."""
    slot = tl.load(changes + change - 1, mask=change >= 0, other=-1)
    at = ((slot // PAGE).to(tl.int64) * KV_HEADS + head) * (PAGE * HEAD_DIM) + slot % PAGE * HEAD_DIM
    if SHARED:
        shift = (kv + at + d)[None, :]
        there = ((slot >= 0) & d_real)[None, :]
    else:
        shift = kv + at[:, None] + d[None, :]
        there = (slot >= 0)[:, None] & d_real[None, :]
    return shift, there


@triton.jit
def _hidden(changes, change, page, stop, PAGE: tl.constexpr):
    """Which keys of pages are hidden, a bit each: int64, of the shape of `page`. None are where `change` is -1."""
    tl.static_assert(PAGE <= 32 or PAGE == 64)
    there = (change >= 0) & (page * PAGE < stop)
    at = changes + change + page * PAGE // 32
    bits = tl.load(at, mask=there, other=0).to(tl.uint32, bitcast=True).to(tl.int64) >> page * PAGE % 32
    if PAGE == 64:
        bits |= tl.load(at + 1, mask=there, other=0).to(tl.int64) << 32
    return bits


@triton.jit
def _both(mask, dims, PADDED: tl.constexpr):
    """`mask`, and `dims` where heads are padded to a power of two."""
    return mask & dims if PADDED else mask


@triton.jit
def _merge(
    row, head, partials, lses, out, first, count,
    q_heads: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """The partials [first, first + count) of one row and HEADS query heads from `head` on, in their order."""
    k = tl.arange(0, BLOCK)
    h = tl.arange(0, HEADS)
    PADDED: tl.constexpr = BLOCK_D != HEAD_DIM
    d = tl.arange(0, HEADS * BLOCK_D)
    d_real = d % BLOCK_D < HEAD_DIM
    if PADDED:
        d = d // BLOCK_D * HEAD_DIM + d % BLOCK_D
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK):
        at = (first + start + k).to(tl.int64) * q_heads + head
        there = start + k < count
        lse = tl.load(lses + at[:, None] + h[None, :], mask=there[:, None], other=float("-inf"), cache_modifier=CACHE)
        stored = _both(there[:, None], d_real[None, :], PADDED)
        part = tl.load(partials + at[:, None] * HEAD_DIM + d[None, :], mask=stored, other=0.0, cache_modifier=CACHE)
        new_top = tl.maximum(top, tl.max(lse, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - finite_top[None, :])
        decay = tl.exp2(top - finite_top)
        total = total * decay + tl.sum(weight, 0)
        part = tl.reshape(part, (BLOCK, HEADS, BLOCK_D)) * weight[:, :, None]
        mixed = mixed * decay[:, None] + tl.sum(part, 0)
        top = new_top
    mixed = tl.reshape(mixed / tl.where(total == 0.0, 1.0, total)[:, None], (HEADS * BLOCK_D,))
    out_at = out + (row.to(tl.int64) * q_heads + head) * HEAD_DIM + d
    if PADDED:
        tl.store(out_at, mixed.to(out.dtype.element_ty), mask=d_real)
    else:
        tl.store(out_at, mixed.to(out.dtype.element_ty))


@triton.jit
def _merged(item, items, rows, merges, MERGES: tl.constexpr):
    """The row of an item that holds one, the row's first partial result, and how many it has."""
    if MERGES:
        row = tl.load(rows + tl.load(items + item * 6) * 2)
        found = (row, tl.load(merges + row * 2), tl.load(merges + row * 2 + 1))
    else:
        found = (0, 0, 0)
    return found


@triton.jit(do_not_specialize_on_alignment=TABLES)
def cascade(
    queries, kv, values_at: tl.int64, positions, cosines, sines, items, spans, rows, frames, pages, changes, counts,
    partials, lses, out, arrived, merges, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    FOLLOWED: tl.constexpr, FOLLOWS: tl.constexpr, DIRECT: tl.constexpr, SHARED: tl.constexpr, HIDES: tl.constexpr,
    SHIFTS: tl.constexpr, MERGES: tl.constexpr,
    MERGE_BLOCK: tl.constexpr, MERGE_HEADS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """The work units of the items from counts[FROM] to counts[TO], spread over however many programs run.

    MERGES: the last unit of a row merges it. FOLLOWED: another launch, which FOLLOWS, takes the other items; it begins
    once this one has its queries, so it needs no wait of its own but the one that keeps completion in order. One
    program is enough for that: the others leave their places to units that still need one. Elsewhere programs without
    a unit wait too, so that those of the next kernel don't come early into the way of this one.
    """
    q_heads: tl.constexpr = KV_HEADS * GROUP
    start = tl.load(counts + FROM) * KV_HEADS + tl.program_id(0)
    stop = tl.load(counts + TO) * KV_HEADS
    if USE_PDL and not FOLLOWED:
        tl.extra.cuda.gdc_launch_dependents()
    for unit in range(start, stop, tl.num_programs(0)):
        item = unit // KV_HEADS
        head = unit % KV_HEADS
        row, first, count = _merged(item, items, rows, merges, MERGES)  # known before what _unit waits for
        _unit(
            item, head, unit == start, queries, kv, values_at, positions, cosines, sines, items, spans, rows,
            frames, pages, changes, partials, lses, out, scale, KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, PAGE, BLOCK_M,
            BLOCK_N, STAGES, DIRECT, SHARED, HIDES, SHIFTS, FOLLOWED, USE_PDL and not FOLLOWS,
        )  # fmt: skip
        if MERGES:
            tl.debug_barrier()
            before = tl.atomic_add(arrived + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
            if before == count - 1:
                if MERGE_HEADS == GROUP:
                    _merge(
                        row, head * GROUP, partials, lses, out, first, count,
                        q_heads, GROUP, HEAD_DIM, BLOCK_D, MERGE_BLOCK, ".cg",
                    )  # fmt: skip
                else:
                    for g in range(GROUP):
                        _merge(
                            row, head * GROUP + g, partials, lses, out, first, count,
                            q_heads, 1, HEAD_DIM, BLOCK_D, MERGE_BLOCK, ".cg",
                        )  # fmt: skip
                tl.store(arrived + row * KV_HEADS + head, 0)
    if USE_PDL and (tl.program_id(0) == 0 if FOLLOWS else start >= stop):
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize_on_alignment=TABLES)
def merge(
    partials, lses, out, merges,
    Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MERGE_BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program per row and query head; a row without partials is zero."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(merges + row * 2)
    count = tl.load(merges + row * 2 + 1)
    k = tl.arange(0, MERGE_BLOCK)
    PADDED: tl.constexpr = BLOCK_D != HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    d_real = d < HEAD_DIM
    top = float("-inf")
    total = 0.0
    mixed = tl.zeros([BLOCK_D], tl.float32)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in range(0, count, MERGE_BLOCK):
        at = (first + start + k).to(tl.int64) * Q_HEADS + head
        there = start + k < count
        stored = _both(there[:, None], d_real[None, :], PADDED)
        part = tl.load(partials + at[:, None] * HEAD_DIM + d[None, :], mask=stored, other=0.0)
        lse = tl.load(lses + at, mask=there, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - finite_top)
        decay = tl.exp2(top - finite_top)
        total = total * decay + tl.sum(weight, 0)
        mixed = mixed * decay + tl.sum(part * weight[:, None], 0)
        top = new_top
    mixed = mixed / tl.where(total == 0.0, 1.0, total)
    out_at = out + (row.to(tl.int64) * Q_HEADS + head) * HEAD_DIM + d
    if PADDED:
        tl.store(out_at, mixed.to(out.dtype.element_ty), mask=d_real)
    else:
        tl.store(out_at, mixed.to(out.dtype.element_ty))
