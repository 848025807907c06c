"""Products of several rows with a weight, by matrix instructions: what the linear operations begin with on a GPU.

On a CPU, `native.py` and the C source beside it compute these operations as a whole.
"""

from braidsdk.kernels.products.launch import many_products, products

__all__ = ["many_products", "products"]
