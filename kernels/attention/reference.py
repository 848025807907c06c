"""Grouped-query attention over segments, torch reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.kernels.paging import PagedSegment, Request, gather
from braidsdk.kernels.rope import RotaryTable, rotate

_ROWS = 512
"""Rows whose scores are in memory at once."""


def cascade_attention(
    queries: Tensor,
    positions: Tensor,
    requests: Sequence[Request],
    kv: Tensor,
    rotary: RotaryTable,
    scale: float,
    limit: int,
) -> Tensor:
    """Softmax over the union of all visible keys of all segments of a row's request, applied to their values.

    The score of a query at absolute position p and key j of a segment with origin s is
    `scale * (R(p - s) q) . (R(j) k)`: RoPE depends on the difference of positions alone, so keys are read as they are
    stored, rotated in their segment's frame, and the query is rotated per segment. A key is visible to a row if and
    only if its absolute position is not above the row's, in every segment.

    Args:
        queries: normed, unrotated, [tokens, q_heads, head_dim].
        positions: absolute position of each token, int64 [tokens].
        requests: which rows see which segments; rows of no request are left zero.
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim], the new tokens already appended.
        rotary: cosines and sines of the model.
        scale: factor on the scores.
        limit: a bound that every `p - s` is below.

    Returns:
        [tokens, q_heads, head_dim], the dtype of `queries`. A row that sees no key is zero.
    """
    out = torch.zeros_like(queries)
    for request in requests:
        cached = [(segment, *gather(kv, segment)) for segment in request.segments if segment.stop > segment.start]
        for first in range(request.rows.start, request.rows.stop, _ROWS):
            rows = slice(first, min(first + _ROWS, request.rows.stop))
            out[rows] = _attend(queries[rows], positions[rows], cached, rotary, scale, limit)
    return out


def _attend(
    queries: Tensor,
    positions: Tensor,
    cached: Sequence[tuple[PagedSegment, Tensor, Tensor]],
    rotary: RotaryTable,
    scale: float,
    limit: int,
) -> Tensor:
    """Attention of one block of rows of one request; shapes as in `cascade_attention`."""
    tokens, q_heads, head_dim = queries.shape
    if not cached:
        return torch.zeros_like(queries)
    kv_heads = cached[0][1].shape[0]
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = []
    for segment, keys, _ in cached:
        cos, sin = rotary.at((positions - segment.origin).clamp(min=0), limit)
        rotated = rotate(queries, cos, sin).to(wide).view(tokens, kv_heads, -1, head_dim)
        grouped = rotated.permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        score = (grouped @ keys.to(wide).transpose(1, 2) * scale).view(kv_heads, -1, tokens, keys.shape[1])
        at = torch.arange(segment.start, segment.stop, device=positions.device) + segment.origin
        scores.append(score.masked_fill(at > positions[:, None], float("-inf")))
    union = torch.cat(scores, dim=-1)
    sees_none = union.amax(-1, keepdim=True) == float("-inf")
    weights = torch.softmax(union, dim=-1).masked_fill(sees_none, 0.0)
    parts = torch.split(weights.flatten(1, 2), [keys.shape[1] for _, keys, _ in cached], dim=-1)
    mixed = torch.stack([part @ values.to(wide) for part, (_, _, values) in zip(parts, cached, strict=True)]).sum(0)
    return (
        mixed.view(kv_heads, -1, tokens, head_dim)
        .permute(2, 0, 1, 3)
        .reshape(tokens, q_heads, head_dim)
        .to(queries.dtype)
    )
