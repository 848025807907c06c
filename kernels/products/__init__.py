"""Products of several rows with a weight, by matrix instructions: what the linear operations begin with on a GPU.

On a CPU with AMX, `amx.py` and `amx.c` compute these operations as a whole.
"""

from braidsdk.kernels.products.op import products

__all__ = ["products"]
