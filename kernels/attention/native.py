"""Cascade attention by the C kernels: planned once per pass, one call into C per layer."""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.attention.plan import needs_segments, page_bytes
from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_shape
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable

_COLUMNS = _STEP = 128
"""Query rows of a task, and keys of a step, as native.c has them."""

_SEGMENT = 8
"""Numbers of a `Segment` of native.c."""

_READ_PAST = 16
"""Numbers behind the last angles that native.c may read, and multiplies by zero."""


def _int64s(*names: str) -> tuple[tuple[str, type[ctypes.c_int64]], ...]:
    return tuple((name, ctypes.c_int64) for name in names)


def _pointers(*names: str) -> tuple[tuple[str, type[ctypes.c_void_p]], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


class _Plan(ctypes.Structure):
    """`Plan` of native.c."""

    _fields_ = (
        *_int64s("requests_count", "tasks_count", "kv_heads", "page_size", "head_dim", "group"),
        *_pointers("positions", "requests", "segments", "angles", "tasks"),
    )


class _Arguments(ctypes.Structure):
    """`Arguments` of native.c."""

    _fields_ = (
        *_pointers("plan", "queries", "out", "kv"),
        ("pool_pages", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("next", ctypes.c_long),
    )


@dataclass(frozen=True)
class NativePlan:
    """All requests of a pass.

    Attributes:
        tokens: rows of the batch.
        planned: rows of requests; the others are zero.
        pages: that all segments take, those of several requests counted for each.
        highest_page: page id.
        c: the plan as native.c takes it.
        kept: what its pointers point to.
    """

    tokens: int
    planned: int
    pages: int
    highest_page: int
    c: _Plan
    kept: tuple[object, ...]

    backend: ClassVar[Backend] = "native"

    def attend(self, queries: Tensor, kv: Tensor, scale: float) -> Tensor:
        return _attend(queries, self, kv, scale)

    def attend_with_lse(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        raise needs_segments()

    def bytes_read(self, kv: Tensor) -> int:
        return self.pages * page_bytes(kv)


@cache
def _library() -> ctypes.CDLL:
    made = native.library(Path(__file__).with_name("native.c"))
    made.attention_plan.argtypes = [ctypes.POINTER(_Plan), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    made.attention_plan.restype = ctypes.c_int64
    return made


def plan_for_native(
    positions: Tensor,
    requests: Sequence[Request],
    rotary: RotaryTable,
    *,
    limit: int,
    page_size: int,
    group: int,
    kv_heads: int,
    dtype: torch.dtype,
    by_segment: bool = False,
) -> NativePlan:
    """Plan a pass on a CPU; arguments as in `op.plan_attention`.

    Raises:
        RuntimeError: C kernels can't run here.
        ValueError: they don't take this geometry, dtype or `by_segment`, a segment has not the pages that its slice
            needs, or a position is not below `limit`.
    """
    if by_segment:
        raise ValueError("attention: backend='native' gives no log-sum-exp of segments; pass backend='torch'.")
    if reason := native.obstacle():
        raise RuntimeError(f"attention: backend='native' can't run here: {reason}; pass backend='torch'.")
    cos, sin = rotary.table(limit)
    head_dim = 2 * cos.shape[1]
    if (dtype, cos.dtype, positions.device.type) != (torch.bfloat16, torch.float32, "cpu"):
        got = f"{dtype} with angles in {cos.dtype} on {positions.device}"
        raise ValueError(f"attention: backend='native' takes bfloat16 with angles in float32 on the CPU, got {got}.")
    if reason := native.head_dim_obstacle(head_dim):
        raise ValueError(f"attention: backend='native' takes {reason}, got {head_dim}.")
    if page_size % 32 or (page_size > _STEP and page_size % _STEP):
        raise ValueError(
            f"attention: backend='native' takes pages of 32, 64, 96 tokens or a multiple of {_STEP}, got {page_size}."
        )
    positions = positions.to(torch.int64).contiguous()
    rows, segments, kept = array("q"), array("q"), []
    angles = tasks = planned = pages = 0
    for request in requests:
        count = request.rows.stop - request.rows.start
        if count <= 0:
            continue
        if not 0 <= request.rows.start <= len(positions) - count:
            raise ValueError(f"attention: expected rows among {len(positions)} tokens, got {request.rows}.")
        planned += count
        tasks += kv_heads * -(-count * group // _COLUMNS)
        first = len(segments) // _SEGMENT
        for segment in request.segments:
            if segment.stop <= segment.start:
                continue
            needed = -(-segment.stop // page_size)
            table, hidden = segment.pages.contiguous(), segment.hidden
            if len(table) < needed or table.dtype != torch.int64 or not table.is_cpu:
                got = f"{len(table)} of {table.dtype} on {table.device}"
                raise ValueError(f"attention: expected {needed} int64 page ids on the CPU for a segment, got {got}.")
            if hidden is not None:
                hidden = torch.nn.functional.pad(hidden.cpu(), (0, max(0, segment.stop - len(hidden)))).contiguous()
            kept += [table, hidden]
            pages += needed - segment.start // page_size
            address = 0 if hidden is None else hidden.data_ptr()
            shift = -1 if segment.shift is None else segment.shift
            origin = segment.origin - segment.offset  # where place 0 would be
            turn = (angles, segment.offset)
            segments.extend((origin, segment.start, segment.stop, table.data_ptr(), address, *turn, shift))
            angles += head_dim * count
        rows.extend((request.rows.start, count, first, len(segments) // _SEGMENT - first))
    angles_of_all, tasks_of_all = (
        torch.zeros(angles + _READ_PAST, dtype=torch.float32, device="cpu"),
        torch.empty(3 * tasks, dtype=torch.int64, device="cpu"),
    )
    plan = _Plan(
        len(rows) // 4,
        tasks,
        kv_heads,
        page_size,
        head_dim,
        group,
        positions.data_ptr(),
        rows.buffer_info()[0],
        segments.buffer_info()[0],
        angles_of_all.data_ptr(),
        tasks_of_all.data_ptr(),
    )
    highest = _library().attention_plan(ctypes.byref(plan), cos.data_ptr(), sin.data_ptr(), len(cos))
    if highest < 0:
        found = f"a position in a segment's frame that is not below {limit}" if highest == -1 else "a negative page id"
        raise ValueError(f"attention: found {found}.")
    kept_alive = (positions, rows, segments, angles_of_all, tasks_of_all, *kept)
    return NativePlan(len(positions), planned, pages, highest, plan, kept_alive)


def _attend(queries: Tensor, plan: NativePlan, kv: Tensor, scale: float) -> Tensor:
    """What `cascade_attention_reference` computes, for bfloat16; arguments as there.

    Raises:
        ValueError: shapes are not those that were planned, a dtype is not bfloat16, a tensor is not contiguous or not
            on the CPU, or the scale is not positive.
    """
    c = plan.c
    for name, tensor, shape in (
        ("queries", queries, (plan.tokens, c.kv_heads * c.group, c.head_dim)),
        ("kv", kv, (2, kv.shape[1], c.kv_heads, c.page_size, c.head_dim)),
    ):
        if tensor.shape != shape:
            check_shape("attention", name, tensor, *shape)
        if tensor.dtype is not torch.bfloat16 or not tensor.is_cpu or not tensor.is_contiguous():
            got = f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            raise ValueError(f"attention: backend='native' takes contiguous bfloat16 tensors on the CPU, got {got}.")
    if plan.highest_page >= kv.shape[1] or scale <= 0:
        got = f"page {plan.highest_page} of {kv.shape[1]}, scale {scale}"
        raise ValueError(f"attention: expected pages of the memory and a positive scale, got {got}.")
    out = torch.empty_like(queries) if plan.planned == plan.tokens else torch.zeros_like(queries)
    arguments = _Arguments(
        ctypes.addressof(c), queries.data_ptr(), out.data_ptr(), kv.data_ptr(), kv.shape[1], scale, 0
    )
    native.parallel(_library().attention, arguments)
    return out
