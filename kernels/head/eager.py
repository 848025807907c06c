"""Final norm and LM head by torch."""

import torch
from torch import Tensor

from braidsdk.kernels.projection import project
from braidsdk.kernels.rms_norm.reference import rms_norm_reference
from braidsdk.kernels.weight import Int8


def norm_head_torch(hidden: Tensor, norm: Tensor, head: Tensor | Int8, eps: float) -> Tensor:
    """What `op.norm_head` computes."""
    logits = project(rms_norm_reference(hidden, norm, eps), head)
    return logits.to(torch.promote_types(hidden.dtype, torch.float32))
