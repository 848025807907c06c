"""Projection and residual by Triton: the launch."""

from pathlib import Path

import torch
from torch import Tensor

from braidsdk.kernels.launch import MATRIX_ROWS, launch_options, pointers, read_tiles, tile_for
from braidsdk.kernels.products import many_products, products
from braidsdk.kernels.weight import Int8

TILES = read_tiles(Path(__file__).with_name("tiles.json"))
"""The kernels' shapes."""

FEW_ROWS = 64
"""Up to here our kernels are faster; above, the library's matrix product."""

_FINISH_BLOCK = 512


def out_proj_triton(x: Tensor, weight: Tensor | Int8, bias: Tensor | None, residual: Tensor) -> Tensor:
    """What `op.out_proj` computes, rounded once."""
    (rows, size), hidden = x.shape, len(weight)
    if rows > FEW_ROWS:
        if bias is None and isinstance(weight, Tensor):
            return torch.addmm(residual, x, weight.t())
        return residual + many_products(x, weight, bias)
    out = torch.empty_like(residual)
    if not rows:
        return out

    from braidsdk.kernels.out_proj.kernel import add_residual_kernel, out_proj_kernel

    options = launch_options(x.device)
    block_rows, tile = tile_for(TILES, rows, weight)
    if block_rows >= MATRIX_ROWS:
        parts = products(x, weight, block_rows, tile)
        add_residual_kernel[(-(-hidden // _FINISH_BLOCK), rows)](
            parts, bias, residual, out, rows, hidden, len(parts), _FINISH_BLOCK, num_warps=4, **options
        )
        return out
    out_proj_kernel[(-(-hidden // tile.block_n), -(-rows // block_rows))](
        x,
        *pointers(weight),
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
