"""The beginning and the end of a step, plainly."""

import torch
from torch import Tensor


def begin_step_reference(
    token_ids: Tensor, frames: Tensor, slots: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `op.begin_step` computes; arguments and results as there."""
    at = frames.clamp(min=0)
    if slots.ndim == 2:
        slots = torch.where(frames < 0, -1, slots.gather(1, at[:, None])[:, 0])
    return embedding[token_ids], cos[at], sin[at], slots


def end_step_reference(state: Tensor) -> None:
    """What `op.end_step` computes; arguments as there."""
    state += state[1] >= 0
