"""Projection and residual: checks, and which implementation runs."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.launch import (
    MATRIX_ROWS,
    Path,
    Tile,
    Tiles,
    check_shape,
    check_triton,
    launch_options,
    tile_for,
)
from braidsdk.kernels.measure import measured
from braidsdk.kernels.out_proj.reference import out_proj_reference
from braidsdk.kernels.products import products
from braidsdk.kernels.products.amx import out_proj_amx

_LONG = {
    2: Tile(block_n=16, block_k=512, warps=4, stages=1),
    16: Tile(block_n=64, block_k=128, warps=4, stages=6),
    32: Tile(block_n=64, block_k=128, warps=4, stages=6),
    64: Tile(block_n=64, block_k=128, warps=4, stages=4),
}

TILES: Tiles = {
    2048: {
        1: Tile(block_n=8, block_k=512, warps=4, stages=4),
        2: Tile(block_n=8, block_k=256, warps=4, stages=16),
        16: Tile(block_n=64, block_k=128, warps=4, stages=4),
        32: Tile(block_n=64, block_k=256, warps=4, stages=3),
        64: Tile(block_n=64, block_k=256, warps=4, stages=2),
    },
    3072: {
        1: Tile(block_n=4, block_k=256, warps=4, stages=16),
        2: Tile(block_n=4, block_k=512, warps=4, stages=8),
        16: Tile(block_n=64, block_k=128, warps=4, stages=3),
        32: Tile(block_n=64, block_k=256, warps=4, stages=2),
        64: Tile(block_n=64, block_k=128, warps=4, stages=4),
    },
    4096: {
        1: Tile(block_n=4, block_k=256, warps=2, stages=8),
        2: Tile(block_n=16, block_k=512, warps=4, stages=1),
        16: Tile(block_n=64, block_k=128, warps=4, stages=6),
        32: Tile(block_n=64, block_k=128, warps=4, stages=4),
        64: Tile(block_n=64, block_k=128, warps=4, stages=4),
    },
    6144: {
        1: Tile(block_n=4, block_k=256, warps=2, stages=8),
        **_LONG,
    },
    9728: {
        1: Tile(block_n=4, block_k=512, warps=2, stages=4),
        **_LONG,
    },
    12288: {
        1: Tile(block_n=4, block_k=256, warps=2, stages=8),
        **_LONG,
    },
}
"""The kernels' shapes."""

FEW_ROWS = 64
"""Up to here our kernels are faster; above, the library's matrix product."""

_FINISH_BLOCK = 512


@measured("out_proj")
def out_proj(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, path: Path = "torch") -> Tensor:
    """`residual + x @ weight.T + bias`; on all paths but torch's summed in float32 and rounded once.

    Args:
        x: [tokens, size].
        weight: [hidden, size].
        bias: [hidden], or None.
        residual: [tokens, hidden].
        path: which implementation; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16; "amx" contiguous ones in bfloat16 on the CPU.

    Returns:
        [tokens, hidden], the dtype of `x`.

    Raises:
        RuntimeError: what was asked for can't run here.
        ValueError: Triton or "amx" was asked for, and shapes, dtypes or strides are not as above.
    """
    if path == "torch":
        return out_proj_reference(x, weight, bias, residual)
    if path == "amx":
        return out_proj_amx(x, weight, bias, residual)
    op, (rows, size), hidden = "out_proj", x.shape, len(weight)
    check_triton(op, x, weight, bias, residual)
    check_shape(op, "weight", weight, hidden, size)
    check_shape(op, "residual", residual, rows, hidden)
    if bias is not None:
        check_shape(op, "bias", bias, hidden)
    if rows > FEW_ROWS:
        return torch.addmm(residual, x, weight.t()) if bias is None else residual + linear(x, weight, bias)
    out = torch.empty_like(residual)
    if not rows:
        return out

    from braidsdk.kernels.out_proj.kernel import add_residual_kernel, out_proj_kernel

    options = launch_options(x.device)
    block_rows, tile = tile_for(TILES, rows, size)
    if block_rows >= MATRIX_ROWS:
        parts = products(x, weight, block_rows, tile)
        add_residual_kernel[(-(-hidden // _FINISH_BLOCK), rows)](
            parts, bias, residual, out, rows, hidden, len(parts), _FINISH_BLOCK, num_warps=4, **options
        )
        return out
    out_proj_kernel[(-(-hidden // tile.block_n), -(-rows // block_rows))](
        x,
        weight,
        bias,
        residual,
        out,
        rows,
        hidden,
        size,
        block_rows,
        tile.block_n,
        tile.columns(x),
        tile.stages,
        tile.warps,
        num_warps=tile.warps,
        num_stages=1,
        **options,
    )
    return out
