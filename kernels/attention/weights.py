"""How much of some rows' attention each key gets."""

import torch
from torch import Tensor

from braidsdk.kernels.attention.eager import BLOCK_ELEMENTS, scores_of
from braidsdk.kernels.attention.plan import RequestPlan


def largest_weights(queries: Tensor, plan: RequestPlan, kv: Tensor, scale: float) -> Tensor:
    """For each key, the greatest of the softmax weights that all query heads of all rows give it.

    Args:
        queries: normed, unrotated, [tokens, q_heads, head_dim].
        plan: which of them see which segments.
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim].
        scale: factor on the scores.

    Returns:
        float32 (float64 for such queries) [pages * page_size]: what the plan lays out, page after page, 0 where hidden.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    keys = kv[0].index_select(0, plan.pages).to(wide).transpose(0, 1).flatten(1, 2)
    most = torch.zeros(keys.shape[1], dtype=wide, device=keys.device)
    step = max(1, BLOCK_ELEMENTS // (queries.shape[1] * (keys.shape[1] + len(plan.spans) * keys.shape[2])))
    for start in range(0, len(plan.hidden), step):
        block = slice(start, min(start + step, len(plan.hidden)))
        rows = slice(plan.rows.start + block.start, plan.rows.start + block.stop)
        scores = scores_of(queries[rows], plan, block, keys, scale)
        most = torch.maximum(most, torch.softmax(scores, -1).nan_to_num(0.0).amax((0, 1, 2)))
    return most
