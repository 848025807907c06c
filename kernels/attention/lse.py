"""The log-sum-exp of each segment's scores on the GPU, from what work items leave for each row."""

import math

import torch
from torch import Tensor


def partials_by_segment(rows: Tensor, places: Tensor, partials: Tensor, count: int, segments: int) -> Tensor:
    """Which partial results are of which row and segment.

    Args:
        rows, places, partials: of each partial result, its row, its segment's place in the row's request, and its
            own place among all; int64 [partials].
        count: rows of the batch.
        segments: of the request with most of them.

    Returns:
        Partial results, int64 [count, segments, most of one segment]; where there are fewer, one past the last.
    """
    groups = rows * segments + places
    order = (groups * (len(partials) + 1) + partials).argsort()
    sizes = torch.bincount(groups, minlength=count * segments)
    group = groups[order]
    rank = torch.arange(len(partials)) - (sizes.cumsum(0) - sizes)[group]
    index = torch.full((count * segments, int(sizes.max()) if len(sizes) else 0), len(partials))
    index[group, rank] = partials[order]
    return index.view(count, segments, index.shape[1])


def merged_lse(lses: Tensor, by_segment: Tensor) -> Tensor:
    """The partial results' log-sum-exps, to base 2, merged by segment, to base e.

    Args:
        lses: float32 [partials + 1, q_heads]; the last is -inf.
        by_segment: from `partials_by_segment`.

    Returns:
        float32 [rows, q_heads, segments].
    """
    return (lses[by_segment] * math.log(2)).logsumexp(2).transpose(1, 2)
