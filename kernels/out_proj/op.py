"""Projection and residual: checks, and which implementation runs."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.launch import (
    MATRIX_ROWS,
    Path,
    Tile,
    check_shape,
    check_triton,
    counters,
    launch_options,
    tile_for,
)
from braidsdk.kernels.out_proj.reference import out_proj_reference

TILES = {
    1: Tile(block_n=8, block_k=1024, warps=4, stages=2),
    2: Tile(block_n=4, block_k=256, warps=4, stages=8),
    16: Tile(block_n=32, block_k=256, warps=4, stages=3, splits=4),
    32: Tile(block_n=32, block_k=256, warps=4, stages=3, splits=4),
    64: Tile(block_n=32, block_k=256, warps=4, stages=3, splits=4),
}
"""By the rows that one program takes: the kernel's shape."""

LONG_TILES = {**TILES, 1: Tile(block_n=8, block_k=256, warps=4, stages=16)}
"""The same where a row of `x` is longer than `LONG`: one that is all in flight before the wait counts for more."""

LONG = 2048

_PROGRAMS = 160
"""Columns are split as long as this many programs suffice: about as many as there are multiprocessors."""

FEW_ROWS = 64
"""Up to here our kernel is faster; above, the library's matrix product."""


def out_proj(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, path: Path = "torch") -> Tensor:
    """`residual + x @ weight.T + bias`; in Triton's path summed in float32 and rounded once.

    Args:
        x: [tokens, size].
        weight: [hidden, size].
        bias: [hidden], or None.
        residual: [tokens, hidden].
        path: which implementation; neither falls back to the other. Triton takes contiguous tensors in float32,
            bfloat16 or float16.

    Returns:
        [tokens, hidden], the dtype of `x`.

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: Triton was asked for, and shapes, dtypes or strides are not as above.
    """
    if path == "torch":
        return out_proj_reference(x, weight, bias, residual)
    op, (rows, size), hidden = "out_proj", x.shape, len(weight)
    check_triton(op, x, weight, bias, residual)
    check_shape(op, "weight", weight, hidden, size)
    check_shape(op, "residual", residual, rows, hidden)
    if bias is not None:
        check_shape(op, "bias", bias, hidden)
    if rows > FEW_ROWS:
        return torch.addmm(residual, x, weight.t()) if bias is None else residual + linear(x, weight, bias)
    out = torch.empty_like(residual)
    if rows:
        from braidsdk.kernels.out_proj.kernel import out_proj_kernel

        block_rows, tile = tile_for(LONG_TILES if size > LONG else TILES, rows)
        matrix = block_rows >= MATRIX_ROWS
        columns, blocks = -(-hidden // tile.block_n), -(-rows // block_rows)
        splits = max(1, min(tile.splits, _PROGRAMS // (columns * blocks))) if matrix else 1
        parts = x.new_empty(splits * rows, hidden, dtype=torch.float32) if splits > 1 else None
        out_proj_kernel[(columns, blocks, splits)](
            x,
            weight,
            bias,
            residual,
            parts,
            counters(op, x.device, columns * blocks) if splits > 1 else None,
            out,
            rows,
            hidden,
            size,
            block_rows,
            tile.block_n,
            tile.columns(x),
            tile.stages,
            splits,
            matrix,
            tile.warps,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **launch_options(x.device),
        )
    return out
