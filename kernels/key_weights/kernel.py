"""Largest softmax weights of keys, device code. Queries are turned, and scores computed, as in attention's kernel."""

import triton
import triton.language as tl

from braidsdk.kernels.attention.kernel import LOG2_E
from braidsdk.kernels.few_rows import wait_for_inputs


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("positions", "pages", "changes", "merges"))
def key_weights_kernel(
    queries, kv, positions, cosines, sines, pages, changes, merges, lses, weights, rows, keys, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIALS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK_N keys of a page and KV head: against all rows, BLOCK_M / GROUP at a time.

    The weight of a key is exp2 of its score less the log-sum-exp of all scores of the row and query head, which is
    merged from that of its partial results, `PARTIALS` at once. `pages` and `changes` are those of
    `launch.TritonKeyWeights`, `merges` those of `attention.tables.Tables`.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_ROWS: tl.constexpr = BLOCK_M // GROUP
    q_heads: tl.constexpr = KV_HEADS * GROUP
    block, head = tl.program_id(0), tl.program_id(1)
    entry = pages + block // (PAGE // BLOCK_N) * 7
    page = tl.load(entry).to(tl.int64)
    inner = block % (PAGE // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(entry + 1) + inner
    origin = tl.load(entry + 2)
    low = tl.load(entry + 3)
    high = tl.load(entry + 4)
    change = tl.load(entry + 5)
    offset = tl.load(entry + 6)
    slot = tl.load(changes + change - 1, change >= 0, other=-1)
    inside = (token >= low) & (token < high)
    word = tl.load(changes + change + token // 32, inside & (change >= 0), other=0)
    inside &= ((word >> (token % 32)) & 1) == 0

    half = tl.arange(0, BLOCK_D // 2)
    d = tl.arange(0, BLOCK_D)
    d_real = d % (BLOCK_D // 2) < HALF
    d = d // (BLOCK_D // 2) * HALF + d % (BLOCK_D // 2)  # each half by itself, as queries are turned
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, PARTIALS)
    wait_for_inputs(USE_PDL)
    tile = kv + (page * KV_HEADS + head) * (PAGE * HEAD_DIM) + inner[:, None] * HEAD_DIM + d[None, :]
    key = tl.load(tile, inside[:, None] & d_real[None, :], other=0.0)
    shift = kv + ((slot // PAGE).to(tl.int64) * KV_HEADS + head) * (PAGE * HEAD_DIM) + slot % PAGE * HEAD_DIM
    mu = tl.load(shift + d, (slot >= 0) & d_real, other=0.0).to(tl.float32)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for first_row in range(0, rows, BLOCK_ROWS):
        row = first_row + m // GROUP
        live = (m // GROUP < BLOCK_ROWS) & (row < rows)
        q_head = head * GROUP + m % GROUP
        position = tl.load(positions + row, live, other=-1).to(tl.int32)
        first = tl.load(merges + row * 2, live, other=0)
        count = tl.load(merges + row * 2 + 1, live, other=0)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, tl.max(count, 0), PARTIALS):
            at = (first[:, None] + start + k[None, :]).to(tl.int64) * q_heads + q_head[:, None]
            lse = tl.load(lses + at, start + k[None, :] < count[:, None], other=float("-inf"))
            new_top = tl.maximum(top, tl.max(lse, 1))
            finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - finite_top) + tl.sum(tl.exp2(lse - finite_top[:, None]), 1)
            top = new_top
        lse_of_row = tl.where(total == 0.0, 0.0, top + tl.log2(tl.where(total == 0.0, 1.0, total)))

        real = live[:, None] & (half < HALF)[None, :]
        turn = tl.maximum(position - origin, 0).to(tl.int64)[:, None] * HALF + half[None, :]
        cosine = tl.load(cosines + turn, real, other=0.0) * (scale * LOG2_E)
        sine = tl.load(sines + turn, real, other=0.0) * (scale * LOG2_E)
        query_at = queries + (row.to(tl.int64) * q_heads + q_head)[:, None] * HEAD_DIM + half[None, :]
        query_a = tl.load(query_at, real, other=0.0).to(tl.float32)
        query_b = tl.load(query_at + HALF, real, other=0.0).to(tl.float32)
        halves = tl.join(query_a * cosine - query_b * sine, query_b * cosine + query_a * sine)
        turned = tl.reshape(tl.permute(halves, (0, 2, 1)), (BLOCK_M, BLOCK_D)).to(kv.dtype.element_ty)
        score = tl.dot(turned, tl.trans(key), input_precision="ieee")
        score += (tl.sum(turned.to(tl.float32) * mu[None, :], 1) - lse_of_row)[:, None]
        visible = inside[None, :] & (token[None, :] <= (position - origin + offset)[:, None]) & live[:, None]
        largest = tl.maximum(largest, tl.max(tl.where(visible, tl.exp2(score), 0.0), 0))
    tl.store(weights + head * keys + block * BLOCK_N + tl.arange(0, BLOCK_N), largest)
