"""Cascade attention: the contract, and what plans and computes it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from braidsdk.kernels.attention.eager import plan_for_torch
from braidsdk.kernels.attention.launch import plan_for_triton
from braidsdk.kernels.attention.native import plan_for_native
from braidsdk.kernels.attention.plan import Plan
from braidsdk.kernels.backends import Backend
from braidsdk.kernels.measure import measured
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable

BACKENDS: dict[Backend, Callable[..., Plan]] = {
    "torch": plan_for_torch,
    "native": plan_for_native,
    "triton": plan_for_triton,
}
"""What plans a pass, by backend. The plan computes it."""


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
    backend: Backend = "torch",
    by_segment: bool = False,
) -> Plan:
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
        backend: what computes it; none falls back to another. Triton takes at most `MOST_GROUP` query heads per KV
            head; "native" bfloat16, a head_dim that `native.head_dim_obstacle` lets pass, and no `by_segment`.
        by_segment: plan for `cascade_attention_lse`; `cascade_attention` takes such a plan too, and is slower on it.

    Raises:
        RuntimeError: the backend can't run here.
        ValueError: it does not take this geometry, this dtype or `by_segment`.
    """
    return BACKENDS[backend](
        positions,
        requests,
        rotary,
        limit=limit,
        page_size=page_size,
        group=group,
        kv_heads=kv_heads,
        dtype=dtype,
        by_segment=by_segment,
    )


def _backend(plan: Plan, **_: object) -> str:
    return plan.backend


def _bytes_read(plan: Plan, kv: Tensor, **_: object) -> int:
    return plan.bytes_read(kv)


@measured("attention", kv_bytes=_bytes_read, backend=_backend)
def cascade_attention(queries: Tensor, plan: Plan, kv: Tensor, scale: float) -> Tensor:
    """Attention of all requests. See `reference.cascade_attention_reference` for the arguments and the result."""
    return plan.attend(queries, kv, scale)


def cascade_attention_lse(queries: Tensor, plan: Plan, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, and the log-sum-exp of each segment's scores, to base e: what attribution to segments is made of.

    Arguments and results as `reference.cascade_attention_lse_reference` says.

    Raises:
        ValueError: the plan was not made with `by_segment=True`.
    """
    return plan.attend_with_lse(queries, kv, scale)
