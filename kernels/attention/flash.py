"""Grouped-query attention over segments on the CPU, through torch's flash attention: no scores in memory.

Few rows (a question, a decoded token) read pages where they lie, each page an item of a batch; many rows (a prefill)
first lay a segment's pages out in a row. Partial results are merged by their natural-log LSE.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from braidsdk.kernels.attention.plan import RequestPlan
from braidsdk.kernels.paging import BLOCK

_FEW_ROWS = 256
_ROW_BLOCK = 512

_ROW_STEP = 32
"""Rows that flash attention takes at once; by measurement a block that is not full costs more than a full one."""

_TURNED_AT_ONCE = 1 << 17
"""Elements of queries that are rotated together, in float32: they stay in a core's cache."""

FLASH_DTYPES = (torch.float32, torch.bfloat16)
"""What flash attention takes."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class _Run:
    """Pages that follow one another in memory.

    Attributes:
        first: page id of the first.
        pages: how many.
        keys: which of each page.
        queries: which segments' frames the queries are in: one for all pages, or one per page.
        mask: added to the scores, [1, 1, padded rows, keys]; None where every row sees every key.
        blind: rows that see no key, [padded rows]; None with `mask`, or where there are none.
    """

    first: int
    pages: int
    keys: slice
    queries: slice
    mask: Tensor | None = None
    blind: Tensor | None = None


@dataclass(frozen=True)
class _Tile:
    """A block of rows against a segment's keys, laid out in a row.

    Attributes:
        rows: among the request's rows.
        segment: index of the segment.
        keys: those of the segment from the first to the last that some row sees, by their places on its pages.
        mask: added to the scores, [rows, keys]; None where every row sees every key.
        blind: rows that see no key, [rows]; None with `mask`, or where there are none.
    """

    rows: slice
    segment: int
    keys: slice
    mask: Tensor | None
    blind: Tensor | None


@dataclass(frozen=True)
class FlashPlan:
    """One request, cut for the CPU: `runs` with few rows, `tiles` with many.

    Attributes:
        base: the request's plan.
        few: whether its rows are few.
        cos: of each row's rotation in each segment's frame, twice, [segments, 1, 1, rows, head_dim]; with few rows the
            segments are in the order of their first pages.
        sin: likewise, the first half negated.
        padded: rows of the queries of one KV head, made up to what flash attention takes well.
        runs: pages that some row sees.
        tiles: ordered by rows; those that see nothing are left out.
        blind: with few rows those that see nothing at all, [padded]; None where there are none.
    """

    base: RequestPlan
    few: bool
    cos: Tensor
    sin: Tensor
    padded: int
    runs: tuple[_Run, ...] = ()
    tiles: tuple[_Tile, ...] = ()
    blind: Tensor | None = None


def plan_flash(
    base: RequestPlan, dtype: torch.dtype, page_size: int, group: int, *, by_segment: bool = False
) -> FlashPlan:
    """Cut a request's plan for queries of `dtype`, `group` query heads for each KV head; `by_segment` into tiles,
    whose log-sum-exps are those of segments."""
    if by_segment or len(base.hidden) > _FEW_ROWS:
        cos, sin = _doubled(base.cos.transpose(0, 1), base.sin.transpose(0, 1))
        return FlashPlan(base, False, cos, sin, len(base.hidden), tiles=_tiles(base, dtype))
    firsts = accumulate((span // page_size for span in base.spans[:-1]), initial=0)
    # Pages of neighbouring segments then are one run where they can be.
    order = base.pages[list(firsts)].argsort(stable=True)
    cos, sin = _doubled(base.cos.transpose(0, 1)[order], base.sin.transpose(0, 1)[order])
    rows = group * len(base.hidden)
    padded = rows if rows <= _ROW_STEP else -(-rows // _ROW_STEP) * _ROW_STEP
    blind = _for_group(base.hidden.all(-1), group, padded)
    return FlashPlan(
        base,
        True,
        cos,
        sin,
        padded,
        runs=_runs(base, order.tolist(), dtype, page_size, group, padded),
        blind=blind if blind.any() else None,
    )


def _doubled(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """For whole heads: dimension i and i + head_dim / 2 turn together, one by the negative sine."""
    return torch.cat((cos, cos), -1)[:, None, None], torch.cat((-sin, sin), -1)[:, None, None]


def _for_group(rows: Tensor, group: int, padded: int) -> Tensor:
    """What is known of each row, bool [rows, ...], for the queries of one KV head; of made-up rows all is False."""
    repeated = rows.repeat(group, *(1 for _ in rows.shape[1:]))
    return torch.cat((repeated, repeated.new_zeros(padded - len(repeated), *rows.shape[1:])))


def _runs(
    base: RequestPlan, order: Sequence[int], dtype: torch.dtype, page_size: int, group: int, padded: int
) -> tuple[_Run, ...]:
    """The pages of all segments in this order, as few runs as can be."""
    runs: list[_Run] = []
    for page in _pages(base, order, dtype, page_size, group, padded):
        if runs and (joined := _joined(runs[-1], page, page_size)):
            runs[-1] = joined
        else:
            runs.append(page)
    return tuple(runs)


def _pages(
    base: RequestPlan, order: Sequence[int], dtype: torch.dtype, page_size: int, group: int, padded: int
) -> Iterator[_Run]:
    """Each page that some row sees, by itself."""
    hidden = base.hidden.view(len(base.hidden), -1, page_size)
    unseen, places = hidden.all(0), torch.arange(page_size)
    first = torch.where(unseen, page_size, places).amin(-1)
    last = torch.where(unseen, 0, places + 1).amax(-1)
    starts = first // BLOCK * BLOCK  # whole blocks: none of another entry's keys are read
    stops = (-(-last // BLOCK) * BLOCK).clamp(max=page_size)
    plain = ((~hidden).all(0).sum(-1) == stops - starts).tolist()
    ids, keys = base.pages.tolist(), [slice(*ends) for ends in zip(starts.tolist(), stops.tolist(), strict=True)]
    ends = list(accumulate(span // page_size for span in base.spans))
    for place, segment in enumerate(order):
        for at in range(ends[segment] - base.spans[segment] // page_size, ends[segment]):
            if not keys[at].stop:
                continue
            page = _Run(ids[at], 1, keys[at], slice(place, place + 1))
            if not plain[at]:
                mask, blind = _mask(_for_group(hidden[:, at, keys[at]], group, padded), dtype)
                page = replace(page, mask=None if mask is None else mask[None, None], blind=blind)
            yield page


def _joined(run: _Run, page: _Run, page_size: int) -> _Run | None:
    """A run and the page after it as one, where they can be."""
    alike = run.keys == page.keys == slice(0, page_size) and run.mask is None and page.mask is None
    if not alike or page.first != run.first + run.pages:
        return None
    if page.queries == run.queries:
        return replace(run, pages=run.pages + 1)
    stepping = run.queries.stop - run.queries.start == run.pages and page.queries.start == run.queries.stop
    if not stepping:
        return None
    return replace(run, pages=run.pages + 1, queries=slice(run.queries.start, page.queries.stop))


def _tiles(base: RequestPlan, dtype: torch.dtype) -> tuple[_Tile, ...]:
    tiles = []
    by_segment = torch.split(base.hidden, list(base.spans), dim=1)
    for start in range(0, len(base.hidden), _ROW_BLOCK):
        rows = slice(start, min(start + _ROW_BLOCK, len(base.hidden)))
        for index, hidden in enumerate(by_segment):
            seen = (~hidden[rows]).any(0).nonzero()
            if len(seen):
                keys = slice(int(seen[0]), int(seen[-1]) + 1)
                tiles.append(_Tile(rows, index, keys, *_mask(hidden[rows, keys], dtype)))
    return tuple(tiles)


def _mask(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if not hidden.any():
        return None, None
    blind = hidden.all(-1)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return mask, blind if blind.any() else None


def flash_attention(
    queries: Tensor, plans: Sequence[FlashPlan], kv: Tensor, scale: float, lse: Tensor | None = None
) -> Tensor:
    """What `cascade_attention_reference` computes, for float32 and bfloat16 on the CPU; arguments as there. `lse`,
    [tokens, q_heads, segments], is filled in place where plans are cut by segment."""
    out = torch.zeros_like(queries)
    for plan in plans:
        rows = queries[plan.base.rows].transpose(0, 1).unflatten(0, (kv.shape[2], -1))
        if plan.few:
            mixed = _over_pages(rows, plan, kv, scale)
        else:
            mixed = _over_tiles(rows, plan, kv, scale, None if lse is None else lse[plan.base.rows])
        out[plan.base.rows].unflatten(1, mixed.shape[:2]).copy_(mixed.permute(2, 0, 1, 3))
    return out


def _turn(queries: Tensor, plan: FlashPlan, out: Tensor) -> None:
    """Write each row's query in each segment's frame, rotated in float32 and rounded once.

    Args:
        queries: [kv_heads, group, rows, head_dim].
        plan: the request's plan.
        out: [segments, kv_heads, group, rows, head_dim].
    """
    wide = queries.float().contiguous()
    swapped = torch.cat(wide.chunk(2, dim=-1)[::-1], dim=-1)
    step = max(1, _TURNED_AT_ONCE // wide.numel())
    space = wide.new_empty(min(step, len(out)), *wide.shape)
    for start in range(0, len(out), step):
        part = slice(start, min(start + step, len(out)))
        turned = torch.mul(wide, plan.cos[part], out=space[: part.stop - start])
        out[part].copy_(turned.addcmul_(swapped, plan.sin[part]))


def _over_pages(queries: Tensor, plan: FlashPlan, kv: Tensor, scale: float) -> Tensor:
    """Few rows: every page by itself, then one merge. Returns [kv_heads, group, rows, head_dim], float32."""
    kv_heads, group, rows, head_dim = queries.shape
    if not plan.runs:
        return torch.zeros(queries.shape)
    # The query heads of one KV head become rows of one product: a page's keys are packed once for all of them.
    turned = queries.new_empty(len(plan.cos), kv_heads, plan.padded, head_dim)
    turned[:, :, group * rows :] = 0
    _turn(queries, plan, turned[:, :, : group * rows].unflatten(2, (group, rows)))
    outs, lses = [], []
    for run in plan.runs:
        keys, values = kv[:, run.first : run.first + run.pages, :, run.keys]
        query = turned[run.queries].expand(run.pages, -1, -1, -1)
        out, lse = _flash(query, keys, values, 0.0, False, attn_mask=run.mask, scale=scale)
        outs += out.unbind()
        lses.append(lse if run.blind is None else lse.masked_fill(run.blind, float("-inf")))
    weights = torch.softmax(torch.cat(lses), dim=0)[..., None]
    if plan.blind is not None:
        weights = weights.masked_fill(plan.blind[:, None], 0.0)
    merged = outs[0] * weights[0]
    for part, weight in zip(outs[1:], weights[1:], strict=True):  # a sum that stays in the processor's cache
        merged.addcmul_(part, weight)
    together: Tensor = merged[:, : group * rows].unflatten(1, (group, rows))
    return together


def _over_tiles(queries: Tensor, plan: FlashPlan, kv: Tensor, scale: float, kept: Tensor | None) -> Tensor:
    """Many rows: a segment at a time, merged as it comes; its log-sum-exps are kept, [rows, q_heads, segments]. Returns
    [kv_heads, group, rows, head_dim], float32."""
    kv_heads, group, count, head_dim = queries.shape
    q_heads = kv_heads * group
    turned = queries.new_empty(len(plan.cos), *queries.shape)
    _turn(queries, plan, turned)
    turned = turned.flatten(1, 2)
    tiles = kv.index_select(1, plan.base.pages).transpose(1, 2).flatten(2, 3)
    by_segment = torch.split(tiles, list(plan.base.spans), dim=2)
    merged = torch.zeros(q_heads, count, head_dim, dtype=torch.float32)
    total = torch.full((q_heads, count, 1), float("-inf"))
    for tile in plan.tiles:
        keys, values = by_segment[tile.segment][:, None, :, tile.keys]
        query = turned[tile.segment, None, :, tile.rows]
        mask = None if tile.mask is None else tile.mask[None, None]
        out, lse = _flash(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        lse = lse[0] if tile.blind is None else lse[0].masked_fill(tile.blind, float("-inf"))
        if kept is not None:
            kept[tile.rows, :, plan.base.places[tile.segment]] = lse.t()
        before, both = total[:, tile.rows], torch.logaddexp(total[:, tile.rows], lse[..., None])
        safe = both.masked_fill(both == float("-inf"), 0.0)
        merged[:, tile.rows] *= torch.exp(before - safe)
        merged[:, tile.rows] += torch.exp(lse[..., None] - safe) * out[0]
        total[:, tile.rows] = both
    together: Tensor = merged.unflatten(0, (kv_heads, group))
    return together
