"""Final norm, LM head and greedy choice, torch reference."""

import torch
from torch import Tensor

from braidsdk.kernels.projection import project
from braidsdk.kernels.rms_norm.reference import rms_norm_reference


def norm_head_reference(hidden: Tensor, norm: Tensor, head: Tensor, eps: float) -> Tensor:
    """Logits of hidden states.

    Args:
        hidden: [rows, hidden].
        norm: weights of the final norm, [hidden].
        head: [vocab_size, hidden].
        eps: of the norm.

    Returns:
        [rows, vocab_size], float32 (float64 for float64 inputs).
    """
    normed = rms_norm_reference(hidden, norm, eps)
    return project(normed, head).to(torch.promote_types(hidden.dtype, torch.float32))


def greedy_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, the lowest id among equals.

    Args:
        logits: [rows, vocab_size].

    Returns:
        Ids, int64 [rows], and whether all of a row is finite, bool [rows]. The id of a row that is not means nothing,
        but lies within the vocabulary.
    """
    finite = logits.isfinite().all(-1)
    numbers = logits.masked_fill(logits.isnan(), float("-inf"))
    ids = torch.arange(logits.shape[-1], device=logits.device)
    best = numbers == numbers.amax(-1, keepdim=True)
    return torch.where(best, ids, len(ids)).amin(-1), finite
