"""Cascade attention on the GPU: which tables a pass gets, and how its kernels are started."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from braidsdk.kernels.attention.lse import merged_lse
from braidsdk.kernels.attention.plan import needs_segments, page_bytes
from braidsdk.kernels.attention.tables import Tables, direct_tables, split_tables
from braidsdk.kernels.backends import MOST_GROUP, Backend
from braidsdk.kernels.checks import check_tensors
from braidsdk.kernels.launch import counters, launch_options, padded
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable

MANY_ROWS = 256
"""From so many rows in a batch on, every request's rows keep the machine busy without cutting its keys."""

SMALL_M, LARGE_M = 16, MOST_GROUP
"""The least and the largest M of a product."""


@dataclass(frozen=True)
class Config:
    """How a kernel is cut, by measurement.

    Attributes:
        stages: of the loop over keys, in flight at once.
        warps: per program.
        items: how many items, times KV heads, each multiprocessor gets.
        long_item: pages of an item from which on there are twice as many.
        registers: that a thread may take, or None for as many as the compiler wants.
        keys: of a page that a product takes at once, or None for the whole page.
    """

    stages: int
    warps: int
    items: int = 1
    long_item: int = 1 << 30
    registers: int | None = None
    keys: int | None = None


CONFIGS = {
    16: Config(3, 4, 2),
    32: Config(3, 4, 2),
    64: Config(3, 4, 1, long_item=16),
}
"""By the M of a product, for 2-byte dtypes."""

BESIDE = Config(2, 4, 2, registers=128)
"""For items of few rows beside larger ones: in what those leave of registers and shared memory two programs fit."""

DIRECT_M, DIRECT_CONFIG = 128, Config(2, 8)
"""Where nothing is to be merged: with many rows each read of keys is shared by more of them."""

_EXACT = Config(1, 8, keys=16)
"""For float32: no tensor cores, and twice the shared memory. Every thread's multiplications are written out, their
operands in registers: of a whole page they spill by kilobytes, and take long to compile."""

CHANGED_REGISTERS = 168
"""What a thread may take with few rows where keys may be hidden or shifted, and heads have at most 128 dimensions: as
many as the compiler chooses where they may not. Left to itself it takes so many more that one program less fits."""


@dataclass(frozen=True)
class Launch:
    """What a launch fixes; a captured graph serves all tables that fit in it.

    Attributes:
        block_m: rows times query heads per KV head of one product.
        programs: how many run; 0 if all items are small ones, far from large ones in the table.
        small_programs: how many more take items of few rows, in a launch of their own; 0 if all items are of one size.
        partials: room for partial results.
        direct: no partial results: every item holds all that its rows see.
        shared: the rows of an item are of one request, and share its frames.
        merges: the last program of a row merges it; needs tables whose items hold one row.
        hides: whether some keys are hidden.
        shifts: whether some segments have a shift.
    """

    block_m: int
    programs: int
    small_programs: int
    partials: int
    direct: bool
    shared: bool
    merges: bool
    hides: bool
    shifts: bool


@dataclass(frozen=True)
class TritonPlan:
    """Attention of one forward pass on the GPU; tensors lie there.

    Attributes:
        tables: the work.
        launch: how it is started.
        positions: absolute position of each row, int64 [rows]; read when the kernel runs.
        cos, sin: of every position up to the largest, float32 [positions, head_dim / 2].
        arrived: zeros, int32 [rows * kv_heads] or more; zero again after each launch.
    """

    tables: Tables
    launch: Launch
    positions: Tensor
    cos: Tensor
    sin: Tensor
    arrived: Tensor

    backend: ClassVar[Backend] = "triton"

    def attend(self, queries: Tensor, kv: Tensor, scale: float) -> Tensor:
        return _attend(queries, self, kv, scale)

    def attend_with_lse(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if self.tables.by_segment is None:
            raise needs_segments()
        lses = queries.new_full((self.launch.partials + 1, queries.shape[1]), float("-inf"), dtype=torch.float32)
        out = _attend(queries, self, kv, scale, lses=lses[:-1])
        return out, merged_lse(lses, self.tables.by_segment)

    def attend_with_partials(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention, and the log-sum-exp of each partial result, to base 2, float32 [partials, q_heads]; those of a row
        are where `tables.merges` says. For a plan that is not `direct`."""
        lses = torch.empty(self.launch.partials, queries.shape[1], dtype=torch.float32, device=kv.device)
        return _attend(queries, self, kv, scale, lses=lses), lses

    def bytes_read(self, kv: Tensor) -> int:
        return len(self.tables.pages) * page_bytes(kv)


def plan_for_triton(
    positions: Tensor,
    requests: Sequence[Request],
    rotary: RotaryTable,
    *,
    limit: int,
    page_size: int,
    group: int,
    kv_heads: int,
    dtype: torch.dtype | None = None,
    by_segment: bool = False,
) -> TritonPlan:
    """Cut a pass into work. Arguments as in `op.plan_attention`; `positions` may lie on either side."""
    cos, sin = rotary.table(limit)
    device, rows = cos.device, len(positions)
    direct = rows >= MANY_ROWS and not by_segment
    size = block_m(group, rows) if dtype in (None, torch.float32) else DIRECT_M
    if direct:
        tables = direct_tables(requests, rows, page_size, size // group)
    else:
        tables = _split(requests, rows, page_size, group, kv_heads, device, by_segment)
    large = 0 if direct else int(tables.counts[1])
    launch = Launch(
        block_m=size if direct else block_m(group, tables.most_rows),
        programs=max(1, (large or len(tables.items)) * kv_heads),
        small_programs=(len(tables.items) - large) * kv_heads if large else 0,
        partials=tables.partials,
        direct=direct,
        shared=tables.shared,
        merges=tables.lone and not direct,
        hides=any(segment.hidden is not None for request in requests for segment in request.segments),
        shifts=any(segment.shift is not None for request in requests for segment in request.segments),
    )
    arrived = counters("attention", device, rows * kv_heads)
    return TritonPlan(tables.to(device), launch, positions.to(device), cos, sin, arrived)


def _split(
    requests: Sequence[Request],
    rows: int,
    page_size: int,
    group: int,
    kv_heads: int,
    device: torch.device,
    by_segment: bool,
) -> Tables:
    size = block_m(group, rows)
    return split_tables(
        requests,
        rows,
        page_size,
        block_rows=block_rows(group, rows),
        small_rows=SMALL_M // group if size > SMALL_M else 0,
        large_items=work_items(device, kv_heads, size),
        small_items=work_items(device, kv_heads, SMALL_M),
        long_item=CONFIGS[size].long_item,
        by_segment=by_segment,
    )


def block_rows(group: int, rows: int) -> int:
    """Rows of one item at most."""
    return max(1, block_m(group, rows) // group)


def block_m(group: int, rows: int) -> int:
    """The M of one product: a power of two that holds these rows, between the least and the largest."""
    return min(LARGE_M, max(SMALL_M, 1 << (rows * group - 1).bit_length()))


def work_items(device: torch.device, kv_heads: int, size: int) -> int:
    """How many items of that M a pass is cut into."""
    if device.type != "cuda":
        return 4
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, processors * CONFIGS[size].items // kv_heads)


def _attend(queries: Tensor, plan: TritonPlan, kv: Tensor, scale: float, *, lses: Tensor | None = None) -> Tensor:
    """What `reference.cascade_attention_reference` computes; `queries` and `kv` as there.

    `lses` takes the partial results' log-sum-exps, to base 2: float32 [partials, q_heads].
    """
    from braidsdk.kernels.attention import kernel

    tables, launch = plan.tables, plan.launch
    _, pages, kv_heads, page_size, head_dim = kv.shape
    rows, q_heads, _ = queries.shape
    check_tensors("cascade_attention", "triton", queries, kv)
    if head_dim < 16 or head_dim % 16:
        raise ValueError(f"cascade_attention: expected a head_dim that is a multiple of 16, got {head_dim}.")
    if (group := q_heads // kv_heads) > LARGE_M:
        raise ValueError(
            f"cascade_attention: expected at most {LARGE_M} query heads per KV head, got {group}; pass backend='torch'."
        )
    out = torch.empty_like(queries) if tables.complete else torch.zeros_like(queries)
    partials = torch.empty(launch.partials, q_heads, head_dim, dtype=torch.float32, device=kv.device)
    if lses is None:
        lses = torch.empty(launch.partials, q_heads, dtype=torch.float32, device=kv.device)
    options = launch_options(kv.device)
    parts = []  # where `counts` has an end of the items, M, programs
    if launch.programs:
        parts.append((0, 1 if launch.small_programs else 3, launch.block_m, launch.programs))
    if launch.small_programs:
        parts.append((2, 3, SMALL_M, launch.small_programs))
    for begin, end, size, programs in parts:
        follows = len(parts) == 2 and begin == 2
        config = BESIDE if follows else DIRECT_CONFIG if launch.direct else CONFIGS[size]
        if (launch.hides or launch.shifts) and config is CONFIGS[SMALL_M] and not launch.merges and head_dim <= 128:
            config = replace(config, registers=CHANGED_REGISTERS)
        if kv.dtype == torch.float32:
            config = _EXACT
        kernel.cascade[(programs,)](
            queries,
            kv,
            pages * kv_heads * page_size * head_dim,
            plan.positions,
            plan.cos,
            plan.sin,
            tables.items,
            tables.spans,
            tables.rows,
            tables.frames,
            tables.pages,
            tables.changes,
            tables.counts,
            partials,
            lses,
            out,
            plan.arrived,
            tables.merges,
            scale,
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            PAGE=page_size,
            BLOCK_M=size,
            BLOCK_N=min(config.keys or page_size, page_size),
            STAGES=config.stages,
            FROM=begin,
            TO=end,
            FOLLOWED=end == 1,
            FOLLOWS=follows,
            DIRECT=launch.direct,
            SHARED=launch.shared,
            HIDES=launch.hides,
            SHIFTS=launch.shifts,
            MERGES=launch.merges,
            MERGE_BLOCK=32,
            MERGE_HEADS=group if group & (group - 1) == 0 and group <= 4 else 1,
            num_warps=config.warps,
            maxnreg=config.registers,
            **options,
        )
    if not launch.direct and not launch.merges:
        kernel.merge[(rows, q_heads)](
            partials,
            lses,
            out,
            tables.merges,
            Q_HEADS=q_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            MERGE_BLOCK=32,
            num_warps=1,
            **options,
        )
    return out
