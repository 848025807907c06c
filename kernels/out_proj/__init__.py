"""A projection added to the residual stream: attention's output and the MLP's down projection."""

from braidsdk.kernels.out_proj.op import out_proj

__all__ = ["out_proj"]
