"""Largest softmax weights of keys by torch, a block of rows at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from braidsdk.kernels.attention import Plan, cascade_attention, plan_attention
from braidsdk.kernels.attention.eager import BLOCK_ELEMENTS, scores_of
from braidsdk.kernels.attention.plan import RequestPlan, plan_request
from braidsdk.kernels.backends import Backend
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable


@dataclass(frozen=True)
class TorchKeyWeights:
    """A pass beside any backend's attention.

    Attributes:
        attention: its plan.
        seen: the request, laid out.
    """

    attention: Plan
    seen: RequestPlan

    def attend(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return cascade_attention(queries, self.attention, kv, scale), largest_weights(queries, self.seen, kv, scale)


def key_weights_for_torch(
    positions: Tensor,
    request: Request,
    rotary: RotaryTable,
    *,
    limit: int,
    page_size: int,
    group: int,
    kv_heads: int,
    dtype: torch.dtype,
    backend: Backend = "torch",
) -> TorchKeyWeights:
    """Plan a pass; arguments as in `op.plan_key_weights`."""
    attention = plan_attention(
        positions,
        [request],
        rotary,
        limit=limit,
        page_size=page_size,
        group=group,
        kv_heads=kv_heads,
        dtype=dtype,
        backend=backend,
    )
    seen = plan_request(positions, request, rotary, limit, page_size)
    if seen is None:
        raise ValueError("plan_key_weights: expected rows, and a segment with tokens, got none.")
    return TorchKeyWeights(attention, seen)


def largest_weights(queries: Tensor, plan: RequestPlan, kv: Tensor, scale: float) -> Tensor:
    """What `reference.largest_weights_reference` computes; arguments and result as there."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    keys, values = (each.index_select(0, plan.pages).to(wide).transpose(0, 1).flatten(1, 2) for each in kv)
    keys, _ = plan.shifted(keys, values, kv)
    most = keys.new_zeros(keys.shape[:2])
    step = max(1, BLOCK_ELEMENTS // (queries.shape[1] * (keys.shape[1] + len(plan.spans) * keys.shape[2])))
    for start in range(0, len(plan.hidden), step):
        block = slice(start, min(start + step, len(plan.hidden)))
        scores = scores_of(queries[block], plan, block, keys, scale)
        most = torch.maximum(most, torch.softmax(scores, -1).nan_to_num(0.0).amax((1, 2)))
    return most
