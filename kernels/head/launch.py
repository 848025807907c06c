"""Final norm, LM head and greedy choice by Triton: the launches."""

from pathlib import Path

import torch
from torch import Tensor

from braidsdk.kernels.launch import MATRIX_ROWS, counters, launch_options, pointers, read_tiles, tile_for
from braidsdk.kernels.products import products
from braidsdk.kernels.rms_norm import rms_norm
from braidsdk.kernels.weight import Int8

TILES = read_tiles(Path(__file__).with_name("tiles.json"))
"""The kernels' shapes."""

_GREEDY_BLOCK = 4096


def norm_head_triton(hidden: Tensor, norm: Tensor, head: Tensor | Int8, eps: float) -> Tensor:
    """What `op.norm_head` computes, summed in float32 and not rounded."""
    (rows, size), vocab = hidden.shape, len(head)
    block_rows, tile = tile_for(TILES, rows, head)
    if block_rows >= MATRIX_ROWS:
        parts = products(rms_norm(hidden, norm, eps, backend="triton"), head, block_rows, tile)
        return parts[0] if len(parts) == 1 else parts.sum(0)
    logits = torch.empty(rows, vocab, dtype=torch.float32, device=hidden.device)
    if rows:
        from braidsdk.kernels.head.kernel import norm_head_kernel

        norm_head_kernel[(-(-vocab // tile.block_n), -(-rows // block_rows))](
            hidden,
            norm,
            *pointers(head),
            logits,
            rows,
            eps,
            vocab,
            size,
            block_rows,
            tile.block_n,
            tile.columns(hidden),
            tile.stages,
            tile.warps,
            num_warps=tile.warps,
            num_stages=1,
            **launch_options(hidden.device),
        )
    return logits


def greedy_triton(logits: Tensor, out: Tensor) -> None:
    """What `op.greedy` computes."""
    (rows, vocab), device = logits.shape, logits.device
    if rows:
        from braidsdk.kernels.head.kernel import greedy_kernel

        parts = -(-vocab // _GREEDY_BLOCK)
        tops = torch.empty(rows, parts, dtype=torch.float32, device=device)
        top_ids, finite_parts = (torch.empty(rows, parts, dtype=torch.int32, device=device) for _ in range(2))
        greedy_kernel[(parts, rows)](
            logits,
            tops,
            top_ids,
            finite_parts,
            counters("greedy", device, rows),
            out,
            out.stride(0),
            vocab,
            _GREEDY_BLOCK,
            parts,
            1 << (parts - 1).bit_length(),
            num_warps=8,
            **launch_options(device),
        )
