"""Cascade attention by torch: flash attention on a CPU, a block of rows at a time elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from braidsdk.kernels.attention.flash import FLASH_DTYPES, FlashPlan, flash_attention, plan_flash
from braidsdk.kernels.attention.plan import RequestPlan, needs_segments, page_bytes, plan_request
from braidsdk.kernels.backends import Backend
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable, rotate

BLOCK_ELEMENTS = 1 << 25
"""Scores and rotated queries in memory at once; bounds how many rows are computed together."""


@dataclass(frozen=True)
class TorchPlan:
    """A plan per request that has rows and sees at least one token.

    Attributes:
        requests: these plans.
        by_segment: whether the log-sum-exp of each segment can be computed.
        flash: on a CPU, how flash attention runs each of them; None where it does not.
    """

    requests: tuple[RequestPlan, ...]
    by_segment: bool
    flash: tuple[FlashPlan, ...] | None

    backend: ClassVar[Backend] = "torch"

    def attend(self, queries: Tensor, kv: Tensor, scale: float) -> Tensor:
        if self.flash is not None:
            return flash_attention(queries, self.flash, kv, scale)
        return _attention(queries, self.requests, kv, scale, None)

    def attend_with_lse(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if not self.by_segment:
            raise needs_segments()
        wide = torch.promote_types(queries.dtype, torch.float32)
        most = max((plan.segments for plan in self.requests), default=0)
        lse = queries.new_full((*queries.shape[:2], most), float("-inf"), dtype=wide)
        if self.flash is not None:
            return flash_attention(queries, self.flash, kv, scale, lse), lse
        return _attention(queries, self.requests, kv, scale, lse), lse

    def bytes_read(self, kv: Tensor) -> int:
        return sum(len(plan.pages) for plan in self.requests) * page_bytes(kv)


def plan_for_torch(
    positions: Tensor,
    requests: Sequence[Request],
    rotary: RotaryTable,
    *,
    limit: int,
    page_size: int,
    group: int,
    kv_heads: int,  # noqa: ARG001 (all backends plan from the same arguments)
    dtype: torch.dtype,
    by_segment: bool = False,
) -> TorchPlan:
    """Plan a pass; arguments as in `op.plan_attention`."""
    plans = [plan for request in requests if (plan := plan_request(positions, request, rotary, limit, page_size))]
    flash = None
    shifts = any(slot is not None for plan in plans for slot in plan.shifts)
    if positions.device.type == "cpu" and dtype in FLASH_DTYPES and not shifts:
        flash = tuple(plan_flash(plan, dtype, page_size, group, by_segment=by_segment) for plan in plans)
    return TorchPlan(tuple(plans), by_segment, flash)


def _attention(queries: Tensor, plans: Sequence[RequestPlan], kv: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """A block of rows at a time; `lse` is filled in place."""
    out = torch.zeros_like(queries)
    wide = torch.promote_types(queries.dtype, torch.float32)
    for plan in plans:
        tiles = kv.index_select(1, plan.pages).to(wide)
        keys, values = tiles.transpose(1, 2).flatten(2, 3)
        keys, values = plan.shifted(keys, values, kv)
        values = values.masked_fill(plan.outside[:, None], 0.0)
        per_row = queries.shape[1] * (keys.shape[1] + len(plan.spans) * keys.shape[2])
        step = max(1, BLOCK_ELEMENTS // per_row)
        for start in range(0, len(plan.hidden), step):
            stop = min(start + step, len(plan.hidden))
            rows = slice(plan.rows.start + start, plan.rows.start + stop)
            block = slice(start, stop)
            scores = scores_of(queries[rows], plan, block, keys, scale)
            out[rows] = _mixed(scores, plan.hidden[block], values).to(queries.dtype)
            if lse is not None:
                by_segment = [part.logsumexp(-1).flatten(0, 1).t() for part in scores.split(list(plan.spans), -1)]
                lse[rows, :, list(plan.places)] = torch.stack(by_segment, -1)
    return out


def scores_of(queries: Tensor, plan: RequestPlan, block: slice, keys: Tensor, scale: float) -> Tensor:
    """Scores of one block of a request's rows, -inf where hidden: [kv_heads, group, rows, tokens].

    Args:
        queries: [rows, q_heads, head_dim].
        plan: the request's plan.
        block: which of its rows these are.
        keys: of all its segments in order, [kv_heads, tokens, head_dim], float32 or float64.
        scale: factor on the scores.
    """
    rows, _, head_dim = queries.shape
    kv_heads = keys.shape[0]
    segments = len(plan.spans)
    cos, sin = plan.cos[block].flatten(0, 1), plan.sin[block].flatten(0, 1)
    turned = rotate(queries.repeat_interleave(segments, 0), cos, sin).to(keys.dtype)
    # [segments, kv_heads, group * rows, head_dim]: the query heads of one KV head are rows of one product.
    turned = turned.view(rows, segments, kv_heads, -1, head_dim).permute(1, 2, 3, 0, 4).flatten(2, 3)
    scores = torch.cat(
        [
            query @ key.transpose(1, 2)
            for query, key in zip(turned, torch.split(keys, list(plan.spans), 1), strict=True)
        ],
        -1,
    )
    return scores.view(kv_heads, -1, rows, keys.shape[1]).mul_(scale).masked_fill_(plan.hidden[block], float("-inf"))


def _mixed(scores: Tensor, hidden: Tensor, values: Tensor) -> Tensor:
    """Values by their weights, [rows, q_heads, head_dim], from `scores_of` and values like its keys."""
    kv_heads, _, rows, _ = scores.shape
    weights = torch.softmax(scores, dim=-1)
    blind = hidden.all(-1)
    if blind.any():
        weights[:, :, blind] = 0.0
    mixed = weights.flatten(1, 2) @ values
    return mixed.view(kv_heads, -1, rows, values.shape[-1]).permute(2, 0, 1, 3).flatten(1, 2)
