"""Cascade attention: which implementation serves a forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.kernels.attention.cpu import CpuPlan, cascade_attention_cpu, plan_for_cpu
from braidsdk.kernels.attention.launch import TritonPlan, cascade_attention_triton, plan_for_triton
from braidsdk.kernels.attention.plan import RequestPlan, plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.launch import Path
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable

AttentionPlans = tuple[RequestPlan | CpuPlan | TritonPlan, ...]
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
    kv_heads: int,
    dtype: torch.dtype,
    path: Path = "torch",
) -> AttentionPlans:
    """Work out what all layers of a forward pass share.

    Args:
        positions: absolute position of each token, int64 [tokens], on the model's device.
        requests: which rows see which segments.
        rotary: cosines and sines of the model.
        limit: a bound that every position of a row in a segment's frame is below.
        page_size: tokens per page.
        group: query heads per KV head.
        kv_heads: KV heads.
        dtype: of the queries.
        path: "triton" takes the GPU's kernel, "torch" what torch has.

    Returns:
        One plan for the GPU's kernel; else a plan per request that has rows and sees at least one token.
    """
    if path == "triton":
        whole = plan_for_triton(
            positions, requests, rotary, limit=limit, page_size=page_size, group=group, kv_heads=kv_heads
        )
        return (whole,)
    plans = [plan for request in requests if (plan := plan_request(positions, request, rotary, limit, page_size))]
    if positions.device.type == "cpu" and dtype in _FLASH_DTYPES:
        return tuple(plan_for_cpu(plan, dtype, page_size, group) for plan in plans)
    return tuple(plans)


def cascade_attention(queries: Tensor, plans: AttentionPlans, kv: Tensor, scale: float) -> Tensor:
    """Attention of all requests; arguments and result as `reference.cascade_attention_reference` says.

    A plan for the GPU goes through its kernel, float32 and bfloat16 on the CPU through torch's flash attention,
    everything else through the reference.
    """
    if plans and isinstance(plans[0], TritonPlan):
        return cascade_attention_triton(queries, plans[0], kv, scale)
    if cpu_plans := [plan for plan in plans if isinstance(plan, CpuPlan)]:
        return cascade_attention_cpu(queries, cpu_plans, kv, scale)
    return cascade_attention_reference(queries, [plan for plan in plans if isinstance(plan, RequestPlan)], kv, scale)
