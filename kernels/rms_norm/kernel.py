"""RMSNorm, device code."""

import triton
import triton.language as tl

from braidsdk.kernels.few_rows import scaled, wait_for_inputs


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """One program a row. x, out: [rows, SIZE]; weight: [SIZE]; BLOCK >= SIZE, a power of two."""
    k = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + k, k < SIZE, other=0.0)
    wait_for_inputs(USE_PDL)
    start = tl.program_id(0).to(tl.int64) * SIZE
    x = tl.load(x_ptr + start + k, k < SIZE, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    tl.store(out_ptr + start + k, scaled(x, inverse_rms, weight, out_ptr.dtype.element_ty), k < SIZE)
