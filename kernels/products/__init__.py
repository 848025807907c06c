"""Products of several rows with a weight, by matrix instructions: what the linear operations begin with."""

from braidsdk.kernels.products.op import products

__all__ = ["products"]
