"""The beginning and the end of a step, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import wait_for_inputs


@triton.jit(do_not_specialize=["window"])
def begin_step_kernel(
    token_ids_ptr,
    frames_ptr,
    table_ptr,
    embedding_ptr,
    all_cos_ptr,
    all_sin_ptr,
    hidden_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    window,
    HIDDEN: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program a token. hidden: [tokens, HIDDEN]; cos, sin: [tokens, HALF]; slots: int64 [tokens], looked up in the
    table, [tokens, window], or neither is there. Blocks are powers of two that hold HIDDEN and HALF.
    """
    wait_for_inputs(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    token, frame = tl.load(token_ids_ptr + row), tl.load(frames_ptr + row)
    k, d = tl.arange(0, BLOCK), tl.arange(0, HALF_BLOCK)
    at = tl.maximum(frame, 0)
    hidden = tl.load(embedding_ptr + token * HIDDEN + k, k < HIDDEN)
    cos = tl.load(all_cos_ptr + at * HALF + d, d < HALF)
    sin = tl.load(all_sin_ptr + at * HALF + d, d < HALF)
    if table_ptr is not None:
        tl.store(slots_ptr + row, tl.load(table_ptr + row * window + at, frame >= 0, other=-1))
    tl.store(hidden_ptr + row * HIDDEN + k, hidden, k < HIDDEN)
    tl.store(cos_ptr + row * HALF + d, cos, d < HALF)
    tl.store(sin_ptr + row * HALF + d, sin, d < HALF)


@triton.jit(do_not_specialize=["apart", "rows"])
def end_step_kernel(state_ptr, apart, rows, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """BLOCK rows a program. state: the absolute positions, and `apart` behind them those in the rows' segments."""
    wait_for_inputs(USE_PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    frame = tl.load(state_ptr + apart + row, row < rows, other=-1)
    position = tl.load(state_ptr + row, row < rows, other=0)
    tl.store(state_ptr + row, position + 1, frame >= 0)
    tl.store(state_ptr + apart + row, frame + 1, frame >= 0)
