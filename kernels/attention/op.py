"""Cascade attention: which implementation serves a forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.kernels.attention.cpu import CpuPlan, cascade_attention_cpu, plan_for_cpu
from braidsdk.kernels.attention.plan import RequestPlan, plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable

AttentionPlans = tuple[RequestPlan | CpuPlan, ...]
"""What `plan_attention` gives and `cascade_attention` takes."""

_FLASH_DTYPES = (torch.float32, torch.bfloat16)


def plan_attention(
    positions: Tensor,
    requests: Sequence[Request],
    rotary: RotaryTable,
    *,
    limit: int,
    page_size: int,
    group: int,
    dtype: torch.dtype,
) -> AttentionPlans:
    """Work out what all layers of a forward pass share.

    Args:
        positions: absolute position of each token, int64 [tokens].
        requests: which rows see which segments.
        rotary: cosines and sines of the model.
        limit: a bound that every position of a row in a segment's frame is below.
        page_size: tokens per page.
        group: query heads per KV head.
        dtype: of the queries.

    Returns:
        A plan per request that has rows and sees at least one token.
    """
    plans = [plan for request in requests if (plan := plan_request(positions, request, rotary, limit, page_size))]
    if positions.device.type == "cpu" and dtype in _FLASH_DTYPES:
        return tuple(plan_for_cpu(plan, dtype, page_size, group) for plan in plans)
    return tuple(plans)


def cascade_attention(queries: Tensor, plans: AttentionPlans, kv: Tensor, scale: float) -> Tensor:
    """Attention of all requests; arguments and result as `reference.cascade_attention_reference` says.

    float32 and bfloat16 on the CPU go through torch's flash attention, everything else through the reference.
    """
    if cpu_plans := [plan for plan in plans if isinstance(plan, CpuPlan)]:
        return cascade_attention_cpu(queries, cpu_plans, kv, scale)
    return cascade_attention_reference(queries, [plan for plan in plans if isinstance(plan, RequestPlan)], kv, scale)
