"""RMSNorm, gate and up projections and SwiGLU: checks, and which implementation runs."""

from torch import Tensor
from torch.nn.functional import linear

from braidsdk.kernels.launch import (
    MATRIX_ROWS,
    Path,
    Tile,
    check_shape,
    check_triton,
    launch_options,
    tile_for,
)
from braidsdk.kernels.rms_norm import rms_norm
from braidsdk.kernels.swiglu.reference import norm_swiglu_reference

TILES = {
    1: Tile(block_n=16, block_k=256, warps=8, stages=4),
    2: Tile(block_n=8, block_k=256, warps=4, stages=4),
    16: Tile(block_n=32, block_k=256, warps=4, stages=4),
    32: Tile(block_n=32, block_k=256, warps=4, stages=4),
    64: Tile(block_n=32, block_k=128, warps=4, stages=6),
}
"""By the rows that one program takes: the fused kernel's shape. `block_n` counts rows of the gate, and of up again."""

FEW_ROWS = 64
"""Up to here one fused kernel is faster; above, the library's matrix product between a prologue and an epilogue."""

_FINISH_BLOCK = 1024


def norm_swiglu(hidden: Tensor, norm: Tensor, gate_up: Tensor, eps: float, *, path: Path = "torch") -> Tensor:
    """`silu(gate(x)) * up(x)` with `x` the normed hidden states.

    Args:
        hidden: [tokens, hidden].
        norm: weights of the norm, [hidden].
        gate_up: gate and up projections stacked in this order, [2 * intermediate, hidden].
        eps: of the norm.
        path: which implementation; neither falls back to the other. Triton takes contiguous tensors in float32,
            bfloat16 or float16.

    Returns:
        [tokens, intermediate], the dtype of `hidden`.

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: Triton was asked for, and shapes, dtypes or strides are not as above.
    """
    if path == "torch":
        return norm_swiglu_reference(hidden, norm, gate_up, eps)
    op, (rows, size), inner = "norm_swiglu", hidden.shape, len(gate_up) // 2
    check_triton(op, hidden, norm, gate_up)
    check_shape(op, "norm", norm, size)
    check_shape(op, "gate_up", gate_up, 2 * inner, size)
    out = hidden.new_empty(rows, inner)
    if not rows:
        return out

    from braidsdk.kernels.swiglu.kernel import norm_swiglu_kernel, swiglu_kernel

    options = launch_options(hidden.device)
    if rows > FEW_ROWS:
        products = linear(rms_norm(hidden, norm, eps, path="triton"), gate_up)
        swiglu_kernel[(-(-inner // _FINISH_BLOCK), rows)](products, out, inner, _FINISH_BLOCK, num_warps=4, **options)
        return out
    block_rows, tile = tile_for(TILES, rows)
    matrix = block_rows >= MATRIX_ROWS
    fused: Tensor | None = norm
    if matrix:
        hidden, fused = rms_norm(hidden, norm, eps, path="triton"), None
    norm_swiglu_kernel[(-(-inner // tile.block_n), -(-rows // block_rows))](
        hidden,
        fused,
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
        matrix,
        tile.warps,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **options,
    )
    return out
