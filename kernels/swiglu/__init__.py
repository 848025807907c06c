"""RMSNorm, gate and up projections and SwiGLU, as one operation."""

from braidsdk.kernels.swiglu.op import norm_swiglu

__all__ = ["norm_swiglu"]
