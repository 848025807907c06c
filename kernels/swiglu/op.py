"""RMSNorm, gate and up projections and SwiGLU: checks, and which implementation runs."""

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
from braidsdk.kernels.products import products
from braidsdk.kernels.products.amx import norm_swiglu_amx
from braidsdk.kernels.rms_norm import rms_norm
from braidsdk.kernels.swiglu.reference import norm_swiglu_reference

TILES: Tiles = {
    1024: {
        1: Tile(block_n=4, block_k=256, warps=2, stages=2),
        2: Tile(block_n=8, block_k=256, warps=4, stages=2),
        16: Tile(block_n=128, block_k=256, warps=8, stages=2),
        32: Tile(block_n=128, block_k=256, warps=8, stages=2),
        64: Tile(block_n=64, block_k=128, warps=4, stages=4),
    },
    2048: {
        1: Tile(block_n=8, block_k=256, warps=2, stages=1),
        2: Tile(block_n=8, block_k=256, warps=4, stages=2),
        16: Tile(block_n=128, block_k=64, warps=4, stages=6),
        32: Tile(block_n=128, block_k=64, warps=4, stages=6),
        64: Tile(block_n=128, block_k=64, warps=8, stages=6),
    },
    2560: {
        1: Tile(block_n=4, block_k=256, warps=2, stages=2),
        2: Tile(block_n=8, block_k=256, warps=4, stages=2),
        16: Tile(block_n=128, block_k=64, warps=4, stages=4),
        32: Tile(block_n=64, block_k=128, warps=4, stages=3),
        64: Tile(block_n=64, block_k=64, warps=4, stages=4),
    },
    4096: {
        1: Tile(block_n=8, block_k=256, warps=2, stages=1),
        2: Tile(block_n=8, block_k=256, warps=4, stages=2),
        16: Tile(block_n=128, block_k=64, warps=4, stages=4),
        32: Tile(block_n=64, block_k=128, warps=4, stages=3),
        64: Tile(block_n=64, block_k=64, warps=4, stages=4),
    },
}
"""The kernels' shapes. `block_n` counts rows of the gate, and of up again; with matrix instructions, of both."""

FEW_ROWS = 64
"""Up to here our products are faster; above, the library's. Either stands between a norm and a kernel that finishes."""

_FINISH_BLOCK = 1024


@measured("swiglu")
def norm_swiglu(hidden: Tensor, norm: Tensor, gate_up: Tensor, eps: float, *, path: Path = "torch") -> Tensor:
    """`silu(gate(x)) * up(x)` with `x` the normed hidden states.

    Args:
        hidden: [tokens, hidden].
        norm: weights of the norm, [hidden].
        gate_up: gate and up projections stacked in this order, [2 * intermediate, hidden].
        eps: of the norm.
        path: which implementation; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16; "amx" contiguous ones in bfloat16 on the CPU.

    Returns:
        [tokens, intermediate], the dtype of `hidden`.

    Raises:
        RuntimeError: what was asked for can't run here.
        ValueError: Triton or "amx" was asked for, and shapes, dtypes or strides are not as above.
    """
    if path == "torch":
        return norm_swiglu_reference(hidden, norm, gate_up, eps)
    if path == "amx":
        return norm_swiglu_amx(hidden, norm, gate_up, eps)
    op, (rows, size), inner = "norm_swiglu", hidden.shape, len(gate_up) // 2
    check_triton(op, hidden, norm, gate_up)
    check_shape(op, "norm", norm, size)
    check_shape(op, "gate_up", gate_up, 2 * inner, size)
    out = hidden.new_empty(rows, inner)
    if not rows:
        return out

    from braidsdk.kernels.swiglu.kernel import norm_swiglu_kernel, swiglu_kernel

    options = launch_options(hidden.device)
    block_rows, tile = tile_for(TILES, rows, size)
    if block_rows >= MATRIX_ROWS:
        normed = rms_norm(hidden, norm, eps, path="triton")
        parts = linear(normed, gate_up)[None] if rows > FEW_ROWS else products(normed, gate_up, block_rows, tile)
        swiglu_kernel[(-(-inner // _FINISH_BLOCK), rows)](
            parts, out, rows, inner, len(parts), _FINISH_BLOCK, num_warps=4, **options
        )
        return out
    norm_swiglu_kernel[(-(-inner // tile.block_n), -(-rows // block_rows))](
        hidden,
        norm,
        gate_up,
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
