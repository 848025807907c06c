"""Products of several rows with a weight: the launch."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.launch import Tile, launch_options, pointers
from braidsdk.kernels.weight import GROUP, Int8

PROGRAMS = 144
"""Columns are split as long as so many programs suffice: about as many as there are multiprocessors."""

_DENSE_BLOCK = 2048
"""Columns that one program converts."""

_EXACT_COLUMNS = 64
"""Of one load in float32 at most: without matrix instructions every thread's multiplications are written out, and the
operands of more do not fit in registers."""


def products(x: Tensor, weight: Tensor | Int8, block_rows: int, tile: Tile) -> Tensor:
    """Products of `x` [rows, K] with `weight` [N, K], in parts that are still to be added up.

    Args:
        block_rows: the rows that a program takes.
        tile: the kernel's shape.

    Returns:
        Parts, float32 [splits, rows, N]; `sum_parts` in device code adds them.
    """
    (rows, size), count = x.shape, len(weight)
    block_k = tile.columns(x)
    if x.dtype == torch.float32:
        block_k = min(block_k, _EXACT_COLUMNS)
    if isinstance(weight, Int8):
        block_k = min(block_k, GROUP)
    columns, blocks, loads = -(-count // tile.block_n), -(-rows // block_rows), -(-size // block_k)
    splits = max(1, min(loads, PROGRAMS // (columns * blocks)))
    splits = -(-loads // -(-loads // splits))  # no program is without columns
    parts = torch.empty(splits, rows, count, dtype=torch.float32, device=x.device)

    from braidsdk.kernels.products.kernel import products_kernel

    products_kernel[(columns, blocks, splits)](
        x,
        *pointers(weight),
        parts,
        rows,
        count,
        size,
        block_rows,
        tile.block_n,
        block_k,
        tile.stages,
        splits,
        num_warps=tile.warps,
        num_stages=1,
        **launch_options(x.device),
    )
    return parts


def many_products(x: Tensor, weight: Tensor | Int8, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for many rows, by the library's product; a weight in int8 is converted first, once.

    Returns:
        [rows, N], the dtype of `x`.
    """
    if isinstance(weight, Int8):
        from braidsdk.kernels.products.kernel import dense_kernel

        (count, size), converted = weight.shape, x.new_empty(weight.shape)
        dense_kernel[(-(-size // _DENSE_BLOCK), count)](
            *pointers(weight), converted, size, _DENSE_BLOCK, num_warps=4, **launch_options(x.device)
        )
        weight = converted
    return linear(x, weight, bias)
