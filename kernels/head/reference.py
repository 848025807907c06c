"""Final norm, LM head and greedy choice, plainly."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.rms_norm.reference import rms_norm_reference


def norm_head_reference(hidden: Tensor, norm: Tensor, head: Tensor, eps: float) -> Tensor:
    """What `op.norm_head` computes; arguments as there."""
    return linear(rms_norm_reference(hidden, norm, eps), head).to(torch.promote_types(hidden.dtype, torch.float32))


def greedy_reference(logits: Tensor, out: Tensor) -> None:
    """What `op.greedy` computes; arguments as there."""
    numbers = logits.masked_fill(logits.isnan(), float("-inf"))
    ids = torch.arange(logits.shape[-1], device=logits.device)
    best = numbers == numbers.amax(-1, keepdim=True)
    out[0] = torch.where(best, ids, len(ids)).amin(-1)
    out[1] = logits.isfinite().all(-1)
