"""Largest softmax weights of keys, plainly."""

import torch
from torch import Tensor

from braidsdk.kernels.attention.plan import RequestPlan
from braidsdk.kernels.rope import rotate


def largest_weights_reference(queries: Tensor, plan: RequestPlan, kv: Tensor, scale: float) -> Tensor:
    """For each key and KV head, the greatest of the softmax weights that its query heads give the key, of all rows.

    Args:
        queries: normed, unrotated, [rows, q_heads, head_dim].
        plan: of the request that all these rows belong to.
        kv: the layer's paged memory, [2, pages, kv_heads, page_size, head_dim].
        scale: factor on the scores.

    Returns:
        float32 (float64 for such queries) [kv_heads, pages * page_size]: what the plan lays out, page after page, 0
        where no row sees a key.
    """
    wide, kv_heads = torch.promote_types(queries.dtype, torch.float32), kv.shape[2]
    keys, values = (
        each[plan.pages].to(wide).transpose(0, 1).flatten(1, 2).repeat_interleave(queries.shape[1] // kv_heads, 0)
        for each in kv
    )
    keys, _ = plan.shifted(keys, values, kv)  # [q_heads, tokens, head_dim]
    parts = []
    for at, segment in enumerate(torch.split(keys, list(plan.spans), 1)):
        turned = rotate(queries, plan.cos[:, at], plan.sin[:, at]).to(wide)
        parts.append(scale * turned.transpose(0, 1) @ segment.transpose(1, 2))
    scores = torch.cat(parts, -1).masked_fill(plan.hidden, float("-inf"))  # [q_heads, rows, tokens]
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # NaN where a row sees no key
    return weights.view(kv_heads, -1, *weights.shape[1:]).amax((1, 2))
