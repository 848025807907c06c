"""How far a model's next-token distributions are from those of another computation of the same checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from braidsdk.cache.pool import PAGE_SIZE, Pool
from braidsdk.engine.batch import make_batch
from braidsdk.fidelity.layers import runs_in_frames
from braidsdk.models.base import Model


@dataclass(frozen=True)
class Agreement:
    """What one text says about two models, as means over its tokens.

    Attributes:
        tokens: how many.
        kl: Kullback-Leibler divergence of ours from theirs, in nats.
        top1: share of tokens at which both have the same likeliest next token.
        perplexity: ours of the text.
        their_perplexity: theirs.
    """

    tokens: int
    kl: float
    top1: float
    perplexity: float
    their_perplexity: float


@torch.inference_mode()
def agreement(ours: Model, theirs: nn.Module, pieces: Sequence[Sequence[int]]) -> Agreement:
    """Compute some text with both.

    Args:
        ours: a model.
        theirs: the same checkpoint by transformers, on the same device.
        pieces: token ids of the text, at least two in all. Ours computes each piece in a frame of its own.
    """
    ids = torch.tensor([token for piece in pieces for token in piece], device=ours.device)
    page_size = PAGE_SIZE[ours.device.type]
    page_bytes = 2 * ours.config.layers * ours.config.kv_heads * page_size * ours.config.head_dim * ours.dtype.itemsize
    pool = Pool.for_model(ours, page_bytes * sum(-(-len(piece) // page_size) for piece in pieces))
    batch = make_batch(runs_in_frames(pool, pieces), pool)
    logits = ours.forward(batch, pool.kv, torch.arange(len(ids), device=ours.device))
    if logits is None:
        raise RuntimeError("the model gave no logits although rows were asked for")
    return compared(logits, theirs(ids[None]).logits[0], ids)


def compared(ours: Tensor, theirs: Tensor, ids: Tensor) -> Agreement:
    """Compare two models' logits, [tokens, vocab_size], over a text of these ids, [tokens]."""
    kl, own, other, same = 0.0, 0.0, 0.0, 0
    for rows in torch.arange(len(ids)).split(256):  # in float32 they take more than the logits themselves
        mine, their = (logits[rows].float().log_softmax(-1) for logits in (ours, theirs))
        kl += float((their.exp() * (their - mine)).sum())
        same += int((mine.argmax(-1) == their.argmax(-1)).sum())
        told = rows[rows + 1 < len(ids)]
        following = ids[told + 1][:, None]
        own -= float(mine[: len(told)].gather(1, following).sum())
        other -= float(their[: len(told)].gather(1, following).sum())
    count, told_count = len(ids), len(ids) - 1
    perplexities = (float(torch.tensor(each / told_count).exp()) for each in (own, other))
    return Agreement(count, kl / count, same / count, *perplexities)
