"""Final norm and LM head by the C kernels, in one pass over the weight."""

import torch
from torch import Tensor

from braidsdk.kernels.products.native import LOGITS, run
from braidsdk.kernels.weight import Weight


def norm_head_native(hidden: Tensor, norm: Tensor, head: Weight, eps: float) -> Tensor:
    """What `op.norm_head` computes, not rounded: float32."""
    (rows, size), vocab = hidden.shape, head.shape[0]
    out = torch.empty(rows, vocab, dtype=torch.float32, device="cpu")
    run(
        kind=LOGITS,
        rows=rows,
        columns=size,
        outputs=vocab,
        x=hidden,
        norm=norm,
        weight=head,
        eps=eps,
        out=out,
    )
    return out
