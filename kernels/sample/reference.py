"""The choice of a token, plainly."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
"""Of Philox4x32-10."""


@dataclass(frozen=True)
class Choices:
    """How each row's token is chosen; read, and counted on, on the device.

    Attributes:
        shape: temperature (0 takes the likeliest), top_p (1 keeps all), min_p (0 keeps all), repetition penalty (1 is
            none); float64 [4, rows].
        draws: top_k (0 keeps all), seed, and which of the request's tokens this is; int64 [3, rows]. The last is
            counted on by each choice.
        seen: ids that the repetition penalty counts as said, bool [rows, vocab_size]; where there is a penalty, what is
            chosen is marked in it.
    """

    shape: Tensor
    draws: Tensor
    seen: Tensor

    @classmethod
    def greedy(cls, seen: Tensor) -> "Choices":
        """The likeliest of each row of `seen`, without a penalty."""
        rows, device = len(seen), seen.device
        shape = torch.zeros(4, rows, dtype=torch.float64, device=device)
        shape[1] = shape[3] = 1.0
        return cls(shape, torch.zeros(3, rows, dtype=torch.int64, device=device), seen)

    def count_on(self, ids: Tensor) -> None:
        """These were chosen, int64 [rows]: count them, and mark those that a penalty counts."""
        self.draws[2] += 1
        marked = (self.shape[3] != 1.0).nonzero().flatten()
        self.seen[marked, ids[marked]] = True


def sample_reference(logits: Tensor, choices: Choices, out: Tensor) -> None:
    """What `op.sample` computes; arguments as there.

    Sampled by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the largest of score plus
    noise, the noise of each token being its own function of seed, step and id.
    """
    finite = logits.isfinite().all(-1)
    chosen = []
    for row, numbers in enumerate(logits.masked_fill(logits.isnan(), -math.inf)):
        temperature, top_p, min_p, penalty = choices.shape[:, row].tolist()
        top_k, seed, step = choices.draws[:, row].tolist()
        scores = scored(numbers, choices.seen[row], penalty, temperature)
        if temperature and finite[row]:
            kept = kept_reference(scores, int(top_k), top_p, min_p)
            noise = -exponential(int(seed), int(step), torch.arange(len(scores))).log().to(scores.device)
            scores = torch.where(kept, scores - scores.max() + noise, -math.inf)
        chosen.append((scores == scores.max()).nonzero()[0, 0])
    out[0] = torch.stack(chosen)
    out[1] = finite
    choices.count_on(out[0])


def scored(logits: Tensor, seen: Tensor, penalty: float, temperature: float) -> Tensor:
    """Logits after the repetition penalty (Keskar et al. 2019, arXiv:1909.05858) and the temperature.

    Args:
        logits: [vocab_size].
        seen: ids that the penalty counts, bool [vocab_size].
        penalty: divides their positive logits and multiplies their negative ones; 1.0 is none.
        temperature: divides all; 0 leaves them.
    """
    if penalty != 1.0:
        logits = torch.where(seen, logits * torch.where(logits < 0, penalty, 1 / penalty), logits)
    return logits * (1 / temperature) if temperature else logits


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


def exponential(seed: int, step: int, ids: Tensor) -> Tensor:
    """Numbers of the exponential distribution, a function of seed, step and id alone: float32 [ids].

    Each counter gives those of four ids.

    Args:
        seed, step: 64 bits each.
        ids: int64 [ids], ascending, on the CPU.
    """
    counters, places = torch.unique_consecutive(ids // 4, return_inverse=True)
    words = torch.stack(philox(counters, step & WORD, step >> 32, seed))
    uniform = (words[ids % 4, places].float() + 0.5) * 2.0**-32
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
