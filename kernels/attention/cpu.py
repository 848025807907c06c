"""Grouped-query attention over segments on the CPU, through torch's flash attention: no scores in memory.

Few rows (a question, a decoded token) read pages where they lie, each page an item of a batch; many rows (a prefill)
first lay a segment's pages out in a row. Partial results are merged by their natural-log LSE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from braidsdk.kernels.attention.plan import RequestPlan

_FEW_ROWS = 64
_ROW_BLOCK = 512
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class _Run:
    """Pages that follow one another in memory.

    Attributes:
        span: their place among the request's pages.
        first: page id of the first.
        mask: added to their scores, [pages, 1, group * rows, page_size]; None where every row sees every key.
        blind: rows that see no key of a page, [pages, 1, group * rows]; None with `mask`, or where there are none.
    """

    span: slice
    first: int
    mask: Tensor | None
    blind: Tensor | None


@dataclass(frozen=True)
class _Tile:
    """A block of rows against a segment's keys, laid out in a row.

    Attributes:
        rows: among the request's rows.
        segment: index of the segment.
        keys: those of the segment that some row sees, from its first page's first token on.
        mask: added to the scores, [rows, keys]; None where every row sees every key.
        blind: rows that see no key, [rows]; None with `mask`, or where there are none.
    """

    rows: slice
    segment: int
    keys: int
    mask: Tensor | None
    blind: Tensor | None


@dataclass(frozen=True)
class CpuPlan:
    """One request, cut for the CPU: `runs` with few rows, `tiles` with many.

    Attributes:
        base: the request's plan.
        turn: rotation of each row's query in each segment's frame, complex, [segments, 1, rows, head_dim / 2].
        segment_of_page: int64 [pages].
        runs: all pages, in order.
        tiles: ordered by rows; those that see nothing are left out.
    """

    base: RequestPlan
    turn: Tensor
    segment_of_page: Tensor
    runs: tuple[_Run, ...]
    tiles: tuple[_Tile, ...]


def plan_for_cpu(base: RequestPlan, dtype: torch.dtype, page_size: int, group: int) -> CpuPlan:
    """Cut a request's plan for queries of `dtype`, `group` query heads for each KV head."""
    pages_per_segment = torch.tensor([span // page_size for span in base.spans])
    owner = torch.repeat_interleave(torch.arange(len(base.spans)), pages_per_segment)
    few = len(base.hidden) <= _FEW_ROWS
    return CpuPlan(
        base,
        torch.complex(base.cos, base.sin).transpose(0, 1)[:, None].contiguous(),
        owner,
        runs=_runs(base, dtype, page_size, group) if few else (),
        tiles=() if few else _tiles(base, dtype),
    )


def _runs(base: RequestPlan, dtype: torch.dtype, page_size: int, group: int) -> tuple[_Run, ...]:
    pages = base.pages.tolist()
    hidden = base.hidden.repeat(group, 1).view(-1, len(pages), page_size).transpose(0, 1)[:, None]
    cuts = [0, *(i for i in range(1, len(pages)) if pages[i] != pages[i - 1] + 1), len(pages)]
    return tuple(_Run(slice(a, b), pages[a], *_mask(hidden[a:b], dtype)) for a, b in pairwise(cuts))


def _tiles(base: RequestPlan, dtype: torch.dtype) -> tuple[_Tile, ...]:
    tiles = []
    by_segment = torch.split(base.hidden, list(base.spans), dim=1)
    for start in range(0, len(base.hidden), _ROW_BLOCK):
        rows = slice(start, min(start + _ROW_BLOCK, len(base.hidden)))
        for index, hidden in enumerate(by_segment):
            seen = (~hidden[rows]).any(0).nonzero()
            if len(seen):
                keys = int(seen[-1]) + 1
                tiles.append(_Tile(rows, index, keys, *_mask(hidden[rows, :keys], dtype)))
    return tuple(tiles)


def _mask(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if not hidden.any():
        return None, None
    blind = hidden.all(-1)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return mask, blind if blind.any() else None


def cascade_attention_cpu(queries: Tensor, plans: Sequence[CpuPlan], kv: Tensor, scale: float) -> Tensor:
    """What `cascade_attention_reference` computes, for float32 and bfloat16 on the CPU; arguments as there."""
    out = torch.zeros_like(queries)
    for plan in plans:
        attend = _over_pages if plan.runs else _over_tiles
        mixed = attend(_turned(queries[plan.base.rows], plan), plan, kv, scale)
        out[plan.base.rows] = mixed.transpose(0, 1).to(queries.dtype)
    return out


def _turned(queries: Tensor, plan: CpuPlan) -> Tensor:
    """Each row's query in each segment's frame, [segments, q_heads, rows, head_dim], rounded once.

    Dimension i and i + head_dim / 2 turn together: they are one complex number, and its rotation one product.
    """
    real, imaginary = queries.transpose(0, 1).float().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * plan.turn
    out = torch.empty(*turned.shape[:-1], queries.shape[-1], dtype=queries.dtype)
    first, second = out.chunk(2, dim=-1)
    first.copy_(turned.real)
    second.copy_(turned.imag)
    return out


def _over_pages(turned: Tensor, plan: CpuPlan, kv: Tensor, scale: float) -> Tensor:
    """Few rows: every page by itself, then one merge. Returns [q_heads, rows, head_dim], float32."""
    segments, q_heads, rows, head_dim = turned.shape
    # The query heads of one KV head become rows of one product: a page's keys are packed once for all of them.
    per_page = turned.reshape(segments, kv.shape[2], -1, head_dim)[plan.segment_of_page]
    outs, lses = [], []
    for run in plan.runs:
        keys, values = kv[:, run.first : run.first + run.span.stop - run.span.start]
        out, lse = _flash(per_page[run.span], keys, values, 0.0, False, attn_mask=run.mask, scale=scale)
        outs.append(out)
        lses.append(lse if run.blind is None else lse.masked_fill(run.blind, float("-inf")))
    out, lse = torch.cat(outs), torch.cat(lses)
    top = lse.amax(0)
    # Rows that see nothing anywhere have -inf everywhere: any finite top leaves their weights zero.
    weights = torch.exp(lse - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
    weights = (weights / total)[..., None]
    merged = out[0] * weights[0]
    for part, weight in zip(out[1:], weights[1:], strict=True):  # a sum that stays in the processor's cache
        merged.addcmul_(part, weight)
    return merged.view(q_heads, rows, head_dim)


def _over_tiles(turned: Tensor, plan: CpuPlan, kv: Tensor, scale: float) -> Tensor:
    """Many rows: a segment at a time, merged as it comes. Returns [q_heads, rows, head_dim], float32."""
    _, q_heads, count, head_dim = turned.shape
    tiles = kv.index_select(1, plan.base.pages).transpose(1, 2).flatten(2, 3)
    by_segment = torch.split(tiles, list(plan.base.spans), dim=2)
    merged = torch.zeros(q_heads, count, head_dim, dtype=torch.float32)
    total = torch.full((q_heads, count, 1), float("-inf"))
    for tile in plan.tiles:
        keys, values = by_segment[tile.segment][:, None, :, : tile.keys]
        query = turned[tile.segment, None, :, tile.rows]
        mask = None if tile.mask is None else tile.mask[None, None]
        out, lse = _flash(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        lse = lse[0] if tile.blind is None else lse[0].masked_fill(tile.blind, float("-inf"))
        before, both = total[:, tile.rows], torch.logaddexp(total[:, tile.rows], lse[..., None])
        safe = both.masked_fill(both == float("-inf"), 0.0)
        merged[:, tile.rows] *= torch.exp(before - safe)
        merged[:, tile.rows] += torch.exp(lse[..., None] - safe) * out[0]
        total[:, tile.rows] = both
    return merged
