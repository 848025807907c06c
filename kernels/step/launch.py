"""The beginning and the end of a step by Triton: the launches."""

import torch
from torch import Tensor

from braidsdk.kernels.launch import launch_options

_END_ROWS = 64
"""Rows that one program moves on."""


def begin_step_triton(
    token_ids: Tensor, frames: Tensor, slots: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `op.begin_step` computes."""
    tokens, size, half = len(token_ids), embedding.shape[1], cos.shape[1]
    hidden = embedding.new_empty(tokens, size)
    its_cos, its_sin = cos.new_empty(tokens, half), sin.new_empty(tokens, half)
    looked_up = torch.empty_like(frames) if slots.ndim == 2 else None
    if tokens:
        from braidsdk.kernels.step.kernel import begin_step_kernel

        block = 1 << (size - 1).bit_length()
        begin_step_kernel[(tokens,)](
            token_ids,
            frames,
            None if looked_up is None else slots,
            embedding,
            cos,
            sin,
            hidden,
            its_cos,
            its_sin,
            looked_up,
            slots.stride(0),
            size,
            half,
            block,
            1 << (half - 1).bit_length(),
            num_warps=min(max(block // 512, 1), 8),
            **launch_options(embedding.device),
        )
    return hidden, its_cos, its_sin, slots if looked_up is None else looked_up


def end_step_triton(state: Tensor) -> None:
    """What `op.end_step` computes."""
    rows = state.shape[1]
    if rows:
        from braidsdk.kernels.step.kernel import end_step_kernel

        end_step_kernel[(-(-rows // _END_ROWS),)](
            state, state.stride(0), rows, _END_ROWS, num_warps=1, **launch_options(state.device)
        )
