"""Largest softmax weights of keys on the GPU: from the attention's log-sum-exps, in one more launch."""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from braidsdk.kernels.attention.launch import LARGE_M, MANY_ROWS, TritonPlan, plan_for_triton
from braidsdk.kernels.attention.tables import changes_of, page_ids
from braidsdk.kernels.backends import Backend
from braidsdk.kernels.launch import launch_options, padded
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable

_FLOAT32_KEYS = 16
"""Of a page that a program takes in float32; without tensor cores more would be too many instructions."""


@dataclass(frozen=True)
class TritonKeyWeights:
    """A pass on the GPU; tensors lie there.

    Attributes:
        attention: its plan, which leaves partial results.
        pages: of all segments in order, int32 [pages, 7]: page, the place at which it starts, then of its segment the
            origin, the first and one past the last place, and where its first word is in `changes` or -1, as in
            `attention.tables.Tables.frames`; and the offset.
        changes: as there.
    """

    attention: TritonPlan
    pages: Tensor
    changes: Tensor

    def attend(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        from braidsdk.kernels.key_weights.kernel import key_weights_kernel

        attended, lses = self.attention.attend_with_partials(queries, kv, scale)
        _, _, kv_heads, page_size, head_dim = kv.shape
        rows, q_heads, _ = queries.shape
        exact = kv.dtype == torch.float32
        block_n = min(_FLOAT32_KEYS, page_size) if exact else page_size
        keys = len(self.pages) * page_size
        weights = torch.empty(kv_heads, keys, dtype=torch.float32, device=kv.device)
        key_weights_kernel[(keys // block_n, kv_heads)](
            queries,
            kv,
            self.attention.positions,
            self.attention.cos,
            self.attention.sin,
            self.pages,
            self.changes,
            self.attention.tables.merges,
            lses,
            weights,
            rows,
            keys,
            scale,
            KV_HEADS=kv_heads,
            GROUP=q_heads // kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            PAGE=page_size,
            BLOCK_M=LARGE_M,
            BLOCK_N=block_n,
            PARTIALS=32,
            num_warps=8 if exact else 4,
            **launch_options(kv.device),
        )
        return attended, weights


def key_weights_for_triton(
    positions: Tensor,
    request: Request,
    rotary: RotaryTable,
    *,
    limit: int,
    page_size: int,
    group: int,
    kv_heads: int,
    dtype: torch.dtype | None = None,  # noqa: ARG001 (all backends plan from the same arguments)
    backend: Backend = "triton",  # noqa: ARG001
) -> TritonKeyWeights:
    """Plan a pass; arguments as in `op.plan_key_weights`."""
    attention = plan_for_triton(
        positions,
        [request],
        rotary,
        limit=limit,
        page_size=page_size,
        group=group,
        kv_heads=kv_heads,
        by_segment=len(positions) >= MANY_ROWS,  # else so many rows would leave no partial results
    )
    pages, changes = array("i"), array("i")
    for segment in request.segments:
        if segment.stop <= segment.start:
            continue
        ids, last, change = page_ids(segment.pages), -(-segment.stop // page_size), -1
        if segment.changed:
            change = len(changes) + 1
            changes.extend(changes_of(segment, last * page_size))
        for page in range(segment.start // page_size, last):
            bounds = (segment.origin, segment.start, segment.stop)
            pages.extend((ids[page], page * page_size, *bounds, change, segment.offset))
    device, count = attention.cos.device, len(pages)
    pages.extend(changes or (0,))
    table = torch.frombuffer(pages, dtype=torch.int32)
    table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)  # in one copy
    return TritonKeyWeights(attention, table[:count].view(-1, 7), table[count:])
