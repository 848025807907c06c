"""The choice of a token by torch, fast: only what can be sampled is sorted, and gets noise."""

import torch
from torch import Tensor

from braidsdk.kernels.sample.reference import Choices, exponential, kept_reference, scored


def sample_torch(logits: Tensor, choices: Choices, out: Tensor) -> None:
    """What `op.sample` computes."""
    ids, finite = out
    finite.copy_(logits.isfinite().all(-1))
    shapes, draws = choices.shape.t().tolist(), choices.draws.t().tolist()
    for row, (scores, shape, draw, good) in enumerate(zip(logits, shapes, draws, finite.tolist(), strict=True)):
        temperature, top_p, min_p, penalty = shape
        top_k, seed, step = map(int, draw)
        scores = scored(scores, choices.seen[row], penalty, temperature)
        if not temperature or not good:
            ids[row] = scores.nan_to_num(float("-inf")).argmax()
            continue
        if top_k:
            least = scores.topk(min(top_k, len(scores))).values[-1]
            kept = (scores >= least).nonzero().flatten()
        else:
            kept = torch.arange(len(scores), device=scores.device)
        kept, scores = kept.cpu(), scores[kept].cpu()
        can = kept_reference(scores, 0, top_p, min_p)
        kept, scores = kept[can], scores[can]
        noise = -exponential(seed, step, kept).log()
        ids[row] = kept[(scores - scores.max() + noise).argmax()]
    choices.count_on(ids)
