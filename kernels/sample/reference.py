"""The choice of a token, torch reference."""

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
"""Of Philox4x32-10."""


def sample_reference(logits: Tensor, shape: Tensor, draws: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a token per row; see `op.sample`. Counts `draws` on, and marks in `seen` what was chosen.

    Drawn by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the largest of score plus noise,
    the noise of each token being its own function of seed, step and id.

    Args:
        logits: float32 [rows, vocab_size].
        shape, draws, seen: as in `op.Choices`.

    Returns:
        Ids, int64 [rows], and whether all of a row is finite, bool [rows].
    """
    finite = logits.isfinite().all(-1)
    chosen = []
    for row, numbers in enumerate(logits.masked_fill(logits.isnan(), -math.inf)):
        temperature, top_p, min_p, penalty = shape[:, row].tolist()
        top_k, seed, step = draws[:, row].tolist()
        scores = torch.where(seen[row], numbers * torch.where(numbers < 0, penalty, 1 / penalty), numbers)
        if temperature and finite[row]:
            scores = scores * (1 / temperature)
            kept = kept_reference(scores, int(top_k), top_p, min_p)
            noise = -exponential(int(seed), int(step), len(scores)).log().to(scores.device)
            scores = torch.where(kept, scores - scores.max() + noise, -math.inf)
        chosen.append((scores == scores.max()).nonzero()[0, 0])
    ids = torch.stack(chosen)
    draws[2] += 1
    marked = (shape[3] != 1.0).nonzero().flatten()
    seen[marked, ids[marked]] = True
    return ids, finite


def kept_reference(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What can be drawn: top_k, top_p, min_p, in this order.

    Args:
        scores: finite logits divided by the temperature, [vocab_size].
        top_k: keep that many of the largest, and those equal to the last of them; 0 keeps all.
        top_p: keep the fewest whose probabilities reach this sum, of equals those of the highest ids; 1.0 keeps all.
        min_p: keep what is at least that share as likely as the likeliest.

    Returns:
        bool [vocab_size].
    """
    kept = torch.ones_like(scores, dtype=torch.bool)
    if top_k:
        kept = scores >= scores.topk(min(top_k, len(scores))).values[-1]
    if top_p < 1.0:
        likely = scores.double().masked_fill(~kept, -math.inf).softmax(0)
        order = scores.argsort(stable=True)
        enough = likely[order].cumsum(0) > 1.0 - top_p
        enough[-1] = True
        kept = kept & torch.zeros_like(kept).index_put((order,), enough)
    return kept & ((scores - scores.max()).exp() >= min_p)


def exponential(seed: int, step: int, count: int) -> Tensor:
    """Numbers of the exponential distribution, a function of seed, step and place alone: float32 [count].

    Each counter gives four.
    """
    words = torch.stack(philox(torch.arange(-(-count // 4)), step & WORD, step >> 32, seed), 1).flatten()[:count]
    uniform = (words.float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform)


def philox(counter: Tensor, c1: int, c2: int, seed: int) -> list[Tensor]:
    """The four words of Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), 32 bits each in int64.

    Args:
        counter: the counter's first word, int64.
        c1, c2: its second and third; the fourth is zero.
        seed: 64 bits, the key.
    """
    words = [counter, torch.full_like(counter, c1), torch.full_like(counter, c2 & WORD), torch.zeros_like(counter)]
    keys = [seed & WORD, seed >> 32 & WORD]
    for _ in range(ROUNDS):
        products = [words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]]
        high = [product >> 32 & WORD for product in products]
        low = [product & WORD for product in products]
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        keys = [(key + step) & WORD for key, step in zip(keys, KEY_STEPS, strict=True)]
    return words
