"""Grouped-query attention over segments, torch reference; also with the log-sum-exp of each segment's scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.kernels.attention.plan import RequestPlan
from braidsdk.kernels.rope import rotate

_BLOCK_ELEMENTS = 1 << 25
"""Scores and rotated queries in memory at once; bounds how many rows are computed together."""


def cascade_attention_reference(queries: Tensor, plans: Sequence[RequestPlan], kv: Tensor, scale: float) -> Tensor:
    """Softmax over the union of all visible keys of all segments of a row's request, applied to their values.

    The score of a query at absolute position p and key j of a segment with origin s is
    `scale * (R(p - s) q) . (R(j) k)`: RoPE depends on the difference of positions alone, so keys are read as they are
    stored, rotated in their segment's frame, and the query is rotated per segment. A key is visible to a row if and
    only if its absolute position is not above the row's, in every segment.

    Args:
        queries: normed, unrotated, [tokens, q_heads, head_dim].
        plans: which rows see which segments, from `plan_request`.
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim], the new tokens already appended.
            What a page holds beside its tokens must be finite.
        scale: factor on the scores.

    Returns:
        [tokens, q_heads, head_dim], the dtype of `queries`. A row that sees no key is zero.
    """
    return _attention(queries, plans, kv, scale, None)


def cascade_attention_lse_reference(
    queries: Tensor, plans: Sequence[RequestPlan], kv: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same, and the logarithm of the sum of the exponentials of each segment's visible scores, to base e.

    `exp(lse[..., i] - logsumexp(lse, -1))` is the share of a row's weights that fell on segment i of its request.

    Args:
        queries, plans, kv, scale: as in `cascade_attention_reference`.

    Returns:
        What that gives, and [tokens, q_heads, segments], float32 (float64 for such queries), segments as many as the
        request with most of them has; -inf where a row sees none of a segment's keys, or there is no such segment.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    most = max((plan.segments for plan in plans), default=0)
    lse = queries.new_full((*queries.shape[:2], most), float("-inf"), dtype=wide)
    return _attention(queries, plans, kv, scale, lse), lse


def _attention(queries: Tensor, plans: Sequence[RequestPlan], kv: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """A block of rows at a time; `lse` is filled in place."""
    out = torch.zeros_like(queries)
    wide = torch.promote_types(queries.dtype, torch.float32)
    for plan in plans:
        tiles = kv.index_select(1, plan.pages).to(wide)
        keys, values = tiles.transpose(1, 2).flatten(2, 3)
        per_row = queries.shape[1] * (keys.shape[1] + len(plan.spans) * keys.shape[2])
        step = max(1, _BLOCK_ELEMENTS // per_row)
        for start in range(0, len(plan.hidden), step):
            stop = min(start + step, len(plan.hidden))
            rows = slice(plan.rows.start + start, plan.rows.start + stop)
            block = slice(start, stop)
            scores = _scores(queries[rows], plan, block, keys, scale)
            out[rows] = _mixed(scores, plan.hidden[block], values).to(queries.dtype)
            if lse is not None:
                by_segment = [part.logsumexp(-1).flatten(0, 1).t() for part in scores.split(list(plan.spans), -1)]
                lse[rows, :, list(plan.places)] = torch.stack(by_segment, -1)
    return out


def _scores(queries: Tensor, plan: RequestPlan, block: slice, keys: Tensor, scale: float) -> Tensor:
    """Scores of one block of a request's rows, -inf where hidden: [kv_heads, group, rows, tokens].

    Args:
        queries: [rows, q_heads, head_dim].
        plan: the request's plan.
        block: which of its rows these are.
        keys: of all its segments in order, [kv_heads, tokens, head_dim], float32 or float64.
        scale: factor on the scores.
    """
    rows, _, head_dim = queries.shape
    kv_heads = keys.shape[0]
    segments = len(plan.spans)
    cos, sin = plan.cos[block].flatten(0, 1), plan.sin[block].flatten(0, 1)
    turned = rotate(queries.repeat_interleave(segments, 0), cos, sin).to(keys.dtype)
    # [segments, kv_heads, group * rows, head_dim]: the query heads of one KV head are rows of one product.
    turned = turned.view(rows, segments, kv_heads, -1, head_dim).permute(1, 2, 3, 0, 4).flatten(2, 3)
    scores = torch.cat(
        [
            query @ key.transpose(1, 2)
            for query, key in zip(turned, torch.split(keys, list(plan.spans), 1), strict=True)
        ],
        -1,
    )
    return scores.view(kv_heads, -1, rows, keys.shape[1]).mul_(scale).masked_fill_(plan.hidden[block], float("-inf"))


def _mixed(scores: Tensor, hidden: Tensor, values: Tensor) -> Tensor:
    """Values by their weights, [rows, q_heads, head_dim], from `_scores` and values like its keys."""
    kv_heads, _, rows, _ = scores.shape
    weights = torch.softmax(scores, dim=-1)
    blind = hidden.all(-1)
    if blind.any():
        weights[:, :, blind] = 0.0
    mixed = weights.flatten(1, 2) @ values
    return mixed.view(kv_heads, -1, rows, values.shape[-1]).permute(2, 0, 1, 3).flatten(1, 2)
