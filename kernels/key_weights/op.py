"""Largest softmax weights of keys: the contract, and what plans and computes them."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from braidsdk.kernels.attention import Plan
from braidsdk.kernels.backends import Backend
from braidsdk.kernels.key_weights.eager import key_weights_for_torch
from braidsdk.kernels.key_weights.launch import key_weights_for_triton
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable


class KeyWeights(Protocol):
    """A pass of one request, as one backend runs it."""

    @property
    def attention(self) -> Plan:
        """The plan of the attention, also for layers whose weights are not wanted."""
        ...

    def attend(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What `cascade_attention` computes, and what `reference.largest_weights_reference` does; arguments and results
        as there."""
        ...


BACKENDS: dict[Backend, Callable[..., KeyWeights]] = {
    "torch": key_weights_for_torch,
    "native": key_weights_for_torch,  # beside its own attention
    "triton": key_weights_for_triton,
}
"""What plans a pass, by backend. The plan computes it."""


def plan_key_weights(
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
) -> KeyWeights:
    """Work out what all layers of a forward pass share.

    Args:
        positions, rotary, limit, page_size, group, kv_heads, dtype, backend: as in `plan_attention`.
        request: the only one of the pass: its rows are all of them.

    Raises:
        RuntimeError: the backend can't run here.
        ValueError: it does not take this geometry or this dtype, or no segment of the request has a token.
    """
    if all(segment.stop <= segment.start for segment in request.segments) or not len(positions):
        raise ValueError("plan_key_weights: expected rows, and a segment with tokens, got none.")
    return BACKENDS[backend](
        positions,
        request,
        rotary,
        limit=limit,
        page_size=page_size,
        group=group,
        kv_heads=kv_heads,
        dtype=dtype,
        backend=backend,
    )


def weights_by_segment(weights: Tensor, segments: Sequence[PagedSegment], page_size: int) -> tuple[Tensor, ...]:
    """The part of each segment's slice, [tokens], of what lies page after page for all of them, [pages * page_size]."""
    found, at = [], 0
    for segment in segments:
        tokens = max(segment.stop - segment.start, 0)
        begin = at + segment.start % page_size
        found.append(weights[begin : begin + tokens])
        if tokens:
            at += (-(-segment.stop // page_size) - segment.start // page_size) * page_size
    return tuple(found)
