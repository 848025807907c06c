"""Attention over a training row: causal in the documents, and no question sees another one.

Knows nothing about texts. The documents' part runs as plain causal attention, for which there are fast kernels. Only
the questions, a small share of a row, need a mask.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = ["NAME", "branch_attention"]

NAME = "braid_tiny_branches"


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch 2.11 took wrong strides for the slices
def branch_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_options: Any,  # what transformers hands to every attention function
) -> tuple[torch.Tensor, None]:
    """Attention `[rows, length, heads, head_dim]` of `query` `[rows, heads, length, head_dim]`.

    `key` and `value` are `[rows, kv_heads, length, head_dim]`. `attention_mask`, `[rows, 1, questions, length]`, is
    additive and applies to the last `questions` positions. The positions before are causal.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)
    split = key.shape[2] - attention_mask.shape[2]
    documents = scaled_dot_product_attention(
        query[:, :, :split], key[:, :, :split], value[:, :, :split], is_causal=True, scale=scaling
    )
    questions = scaled_dot_product_attention(
        query[:, :, split:], key, value, attn_mask=attention_mask.to(value.dtype), scale=scaling
    )
    return torch.cat([documents, questions], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, branch_attention)
