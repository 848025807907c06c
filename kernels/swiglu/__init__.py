"""RMSNorm, gate and up projections and SwiGLU, as one operation."""

from braidsdk.kernels.swiglu.reference import norm_swiglu

__all__ = ["norm_swiglu"]
