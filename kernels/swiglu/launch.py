"""RMSNorm, gate and up projections and SwiGLU by Triton: the launch."""

from pathlib import Path

from torch import Tensor

from braidsdk.kernels.launch import MATRIX_ROWS, launch_options, pointers, read_tiles, tile_for
from braidsdk.kernels.products import many_products, products
from braidsdk.kernels.rms_norm import rms_norm
from braidsdk.kernels.weight import Int8

TILES = read_tiles(Path(__file__).with_name("tiles.json"))
"""The kernels' shapes. `block_n` counts rows of the gate, and of up again; with matrix instructions, of both."""

FEW_ROWS = 64
"""Up to here our products are faster; above, the library's. Either stands between a norm and a kernel that finishes."""

_FINISH_BLOCK = 1024


def norm_swiglu_triton(hidden: Tensor, norm: Tensor, gate_up: Tensor | Int8, eps: float) -> Tensor:
    """What `op.norm_swiglu` computes."""
    (rows, size), inner = hidden.shape, len(gate_up) // 2
    out = hidden.new_empty(rows, inner)
    if not rows:
        return out

    from braidsdk.kernels.swiglu.kernel import norm_swiglu_kernel, swiglu_kernel

    options = launch_options(hidden.device)
    block_rows, tile = tile_for(TILES, rows, gate_up)
    if block_rows >= MATRIX_ROWS:
        normed = rms_norm(hidden, norm, eps, backend="triton")
        few = rows <= FEW_ROWS
        parts = products(normed, gate_up, block_rows, tile) if few else many_products(normed, gate_up)[None]
        swiglu_kernel[(-(-inner // _FINISH_BLOCK), rows)](
            parts, out, rows, inner, len(parts), _FINISH_BLOCK, num_warps=4, **options
        )
        return out
    norm_swiglu_kernel[(-(-inner // tile.block_n), -(-rows // block_rows))](
        hidden,
        norm,
        *pointers(gate_up),
        out,
        rows,
        eps,
        inner,
        size,
        block_rows,
        tile.block_n,
        tile.columns(hidden),
        tile.stages,
        tile.warps,
        num_warps=tile.warps,
        num_stages=1,
        **options,
    )
    return out
