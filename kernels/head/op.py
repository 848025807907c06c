"""Final norm, LM head and greedy choice: checks, and which implementation runs."""

from typing import Literal

import torch
from torch import Tensor

from braidsdk.kernels.head.reference import greedy_reference, norm_head_reference
from braidsdk.kernels.launch import (
    MATRIX_ROWS,
    Path,
    Tile,
    Tiles,
    check_shape,
    check_triton,
    counters,
    launch_options,
    tile_for,
)
from braidsdk.kernels.measure import measured
from braidsdk.kernels.products import products
from braidsdk.kernels.products.amx import norm_head_amx
from braidsdk.kernels.rms_norm import rms_norm

TILES: Tiles = {
    4096: {
        1: Tile(block_n=16, block_k=256, warps=4, stages=2),
        2: Tile(block_n=8, block_k=256, warps=4, stages=4),
        16: Tile(block_n=64, block_k=128, warps=4, stages=3),
        32: Tile(block_n=64, block_k=128, warps=4, stages=3),
        64: Tile(block_n=128, block_k=64, warps=4, stages=3),
    },
}
"""The kernels' shapes."""

_GREEDY_BLOCK = 4096


@measured("head")
def norm_head(hidden: Tensor, norm: Tensor, head: Tensor, eps: float, *, path: Path = "torch") -> Tensor:
    """Logits of hidden states; on all paths but torch's summed in float32 and never rounded to a narrower dtype.

    Args:
        hidden: [rows, hidden].
        norm: weights of the final norm, [hidden].
        head: [vocab_size, hidden].
        eps: of the norm.
        path: which implementation; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16; "amx" contiguous ones in bfloat16 on the CPU.

    Returns:
        [rows, vocab_size], float32 (float64 for float64 inputs, which only torch takes).

    Raises:
        RuntimeError: what was asked for can't run here.
        ValueError: Triton or "amx" was asked for, and shapes, dtypes or strides are not as above.
    """
    if path == "torch":
        return norm_head_reference(hidden, norm, head, eps)
    if path == "amx":
        return norm_head_amx(hidden, norm, head, eps)
    op, (rows, size), vocab = "norm_head", hidden.shape, len(head)
    check_triton(op, hidden, norm, head)
    check_shape(op, "norm", norm, size)
    check_shape(op, "head", head, vocab, size)
    block_rows, tile = tile_for(TILES, rows, size)
    if block_rows >= MATRIX_ROWS:
        parts = products(rms_norm(hidden, norm, eps, path="triton"), head, block_rows, tile)
        return parts[0] if len(parts) == 1 else parts.sum(0)
    logits = torch.empty(rows, vocab, dtype=torch.float32, device=hidden.device)
    if rows:
        from braidsdk.kernels.head.kernel import norm_head_kernel

        norm_head_kernel[(-(-vocab // tile.block_n), -(-rows // block_rows))](
            hidden,
            norm,
            head,
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


def greedy(logits: Tensor, *, path: Literal["triton", "torch"] = "torch") -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, the lowest id among equals. Neither path synchronises with the host.

    Args:
        logits: [rows, vocab_size]; for Triton contiguous, float32.
        path: which implementation; neither falls back to the other.

    Returns:
        Ids, int64 [rows], and whether all of a row is finite, bool [rows]. The id of a row that is not means nothing,
        but lies within the vocabulary.

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: Triton was asked for, and the logits are not as above.
    """
    if path == "torch":
        return greedy_reference(logits)
    check_triton("greedy", logits)
    if logits.dtype != torch.float32:
        raise ValueError(f"greedy: path='triton' needs float32, got {logits.dtype}; pass path='torch'.")
    (rows, vocab), device = logits.shape, logits.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
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
            ids,
            finite,
            vocab,
            _GREEDY_BLOCK,
            parts,
            1 << (parts - 1).bit_length(),
            num_warps=8,
            **launch_options(device),
        )
    return ids, finite
