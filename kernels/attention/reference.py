"""Grouped-query attention over segments, plainly; also with the log-sum-exp of each segment's scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.kernels.attention.plan import RequestPlan
from braidsdk.kernels.rope import rotate


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
            What a page holds beside a segment's slice may be anything; hidden keys must be finite.
        scale: factor on the scores.

    Returns:
        [tokens, q_heads, head_dim], the dtype of `queries`. A row that sees no key is zero.
    """
    return cascade_attention_lse_reference(queries, plans, kv, scale)[0]


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
    wide, group = torch.promote_types(queries.dtype, torch.float32), queries.shape[1] // kv.shape[2]
    most = max((plan.segments for plan in plans), default=0)
    out = torch.zeros_like(queries)
    lse = queries.new_full((*queries.shape[:2], most), float("-inf"), dtype=wide)
    for plan in plans:
        keys, values = (  # [q_heads, tokens, head_dim]
            each[plan.pages].to(wide).transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0) for each in kv
        )
        keys, values = plan.shifted(keys, values, kv)
        values = values.masked_fill(plan.outside[:, None], 0.0)
        parts = []
        for at, segment in enumerate(torch.split(keys, list(plan.spans), 1)):
            turned = rotate(queries[plan.rows], plan.cos[:, at], plan.sin[:, at]).to(wide)
            parts.append(scale * turned.transpose(0, 1) @ segment.transpose(1, 2))
        scores = torch.cat(parts, -1).masked_fill(plan.hidden, float("-inf"))  # [q_heads, rows, tokens]
        weights = torch.softmax(scores, -1).nan_to_num(0.0)  # NaN where a row sees no key
        out[plan.rows] = (weights @ values).transpose(0, 1).to(queries.dtype)
        for place, part in zip(plan.places, scores.split(list(plan.spans), -1), strict=True):
            lse[plan.rows, :, place] = part.logsumexp(-1).t()
    return out, lse
