"""Shifts, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import wait_for_inputs


@triton.jit
def _halves(memory, slots, inside, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr):
    """Both halves of one head of tokens at these slots: float32 [tokens, dims], of those `inside`."""
    at = memory + ((slots // PAGE) * (KV_HEADS * PAGE * HEAD_DIM) + slots % PAGE * HEAD_DIM)[:, None]
    first = tl.load(at, inside, other=0.0).to(tl.float32)
    second = tl.load(at + HEAD_DIM // 2, inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize_on_alignment=("fresh", "stored", "starts", "targets"))  # they lie in one tensor
def shift_kernel(
    kv, values_at: tl.int64, fresh, stored, starts, targets, cosines, sines, weights,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """A program per shift, KV head, and keys or values: BLOCK tokens at a time, of each BLOCK_D / 2 >= HEAD_DIM / 2
    dimensions of both halves. The arguments from `fresh` to `weights` are those of `plan.Shifts`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    shift, head, of_values = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D // 2)
    real = d < HALF
    start = tl.load(starts + shift).to(tl.int32)
    stop = tl.load(starts + shift + 1).to(tl.int32)
    target = tl.load(targets + shift)
    weight = tl.load(weights + shift)
    # Values are not rotated.
    cosine = tl.load(cosines + shift * HALF + d, real & (of_values == 0), other=1.0)[None, :]
    sine = tl.load(sines + shift * HALF + d, real & (of_values == 0), other=0.0)[None, :]
    memory = kv + of_values * values_at + head * (PAGE * HEAD_DIM) + d[None, :]
    k = tl.arange(0, BLOCK)
    first_sum = tl.zeros([BLOCK, BLOCK_D // 2], tl.float32)
    second_sum = tl.zeros([BLOCK, BLOCK_D // 2], tl.float32)
    wait_for_inputs(USE_PDL)
    for token in range(start, stop, BLOCK):
        there = token + k < stop
        inside = there[:, None] & real[None, :]
        slots = tl.load(fresh + token + k, there, other=0)
        first, second = _halves(memory, slots, inside, KV_HEADS, HEAD_DIM, PAGE)
        slots = tl.load(stored + token + k, there, other=0)
        stored_first, stored_second = _halves(memory, slots, inside, KV_HEADS, HEAD_DIM, PAGE)
        first_sum += first * cosine - second * sine - stored_first
        second_sum += second * cosine + first * sine - stored_second
    at = memory + (target // PAGE) * (KV_HEADS * PAGE * HEAD_DIM) + target % PAGE * HEAD_DIM
    first_mean = tl.sum(first_sum, 0, keep_dims=True) * weight
    second_mean = tl.sum(second_sum, 0, keep_dims=True) * weight
    tl.store(at, first_mean.to(kv.dtype.element_ty), real[None, :])
    tl.store(at + HALF, second_mean.to(kv.dtype.element_ty), real[None, :])
