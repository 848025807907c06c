"""Cascade attention: which implementation serves a forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.kernels.attention.amx import AmxPlan, cascade_attention_amx, plan_for_amx
from braidsdk.kernels.attention.cpu import CpuPlan, cascade_attention_cpu, plan_for_cpu
from braidsdk.kernels.attention.launch import (
    TritonPlan,
    cascade_attention_lse_triton,
    cascade_attention_triton,
    plan_for_triton,
)
from braidsdk.kernels.attention.plan import RequestPlan, plan_request
from braidsdk.kernels.attention.reference import cascade_attention_lse_reference, cascade_attention_reference
from braidsdk.kernels.launch import Path
from braidsdk.kernels.measure import measured
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable

AttentionPlans = tuple[RequestPlan | CpuPlan | TritonPlan | AmxPlan, ...]
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
    by_segment: bool = False,
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
        path: "triton" takes the GPU's kernel, "amx" the C kernel, for bfloat16, "torch" what torch has.
        by_segment: plan for `cascade_attention_lse`; `cascade_attention` takes such plans too, and is slower on them.

    Returns:
        One plan for a kernel; else a plan per request that has rows and sees at least one token.

    Raises:
        RuntimeError: "amx" was asked for where it can't run.
        ValueError: "amx" was asked for a geometry or dtype that it does not take.
    """
    if path == "amx" and not by_segment:
        shape = {"limit": limit, "page_size": page_size, "group": group, "kv_heads": kv_heads}
        return (plan_for_amx(positions, requests, rotary, dtype=dtype, **shape),)
    if path == "triton":
        whole = plan_for_triton(
            positions,
            requests,
            rotary,
            limit=limit,
            page_size=page_size,
            group=group,
            kv_heads=kv_heads,
            by_segment=by_segment,
        )
        return (whole,)
    plans = [plan for request in requests if (plan := plan_request(positions, request, rotary, limit, page_size))]
    if positions.device.type == "cpu" and dtype in _FLASH_DTYPES and not by_segment:
        return tuple(plan_for_cpu(plan, dtype, page_size, group) for plan in plans)
    return tuple(plans)


def _path(plans: AttentionPlans, **_: object) -> str:
    if plans and isinstance(plans[0], TritonPlan):
        return "triton"
    return "amx" if plans and isinstance(plans[0], AmxPlan) else "torch"


def _read_bytes(plans: AttentionPlans, kv: Tensor, **_: object) -> int:
    """The pages of all segments: once for each request, or once for all of them where the GPU's kernel reads so."""
    pages = 0
    for plan in plans:
        if isinstance(plan, AmxPlan):
            pages += plan.pages
            continue
        base = plan.base if isinstance(plan, CpuPlan) else plan
        pages += len(base.tables.pages if isinstance(base, TritonPlan) else base.pages)
    return pages * 2 * kv[0, 0].numel() * kv.element_size()


@measured("attention", kv_bytes=_read_bytes, path=_path)
def cascade_attention(queries: Tensor, plans: AttentionPlans, kv: Tensor, scale: float) -> Tensor:
    """Attention of all requests; arguments and result as `reference.cascade_attention_reference` says.

    A plan for a kernel goes through it, float32 and bfloat16 on the CPU through torch's flash attention,
    everything else through the reference.
    """
    if plans and isinstance(plans[0], TritonPlan):
        return cascade_attention_triton(queries, plans[0], kv, scale)
    if plans and isinstance(plans[0], AmxPlan):
        return cascade_attention_amx(queries, plans[0], kv, scale)
    if cpu_plans := [plan for plan in plans if isinstance(plan, CpuPlan)]:
        return cascade_attention_cpu(queries, cpu_plans, kv, scale)
    return cascade_attention_reference(queries, [plan for plan in plans if isinstance(plan, RequestPlan)], kv, scale)


def cascade_attention_lse(queries: Tensor, plans: AttentionPlans, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, and the log-sum-exp of each segment's scores, to base e: what attribution to segments is made of.

    Arguments and results as `reference.cascade_attention_lse_reference` says. A plan for the GPU goes through its
    kernel, everything else through the reference.

    Raises:
        ValueError: the plans were not made with `by_segment=True`.
    """
    if plans and isinstance(plans[0], TritonPlan):
        return cascade_attention_lse_triton(queries, plans[0], kv, scale)
    if any(isinstance(plan, CpuPlan | AmxPlan) for plan in plans):
        raise ValueError("cascade_attention_lse: expected plans made with by_segment=True; plan the pass anew.")
    plain = [plan for plan in plans if isinstance(plan, RequestPlan)]
    return cascade_attention_lse_reference(queries, plain, kv, scale)
