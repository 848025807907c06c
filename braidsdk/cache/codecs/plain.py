"""The codec "plain": keys and values as the model computes them, in its dtype.

The tensors are `layer.000`, `layer.001`, ..., each [2 (K, V), kv_heads, tokens, head_dim]. They know no pages, so
devices with other pages share files, and no padding is written.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from braidsdk.store.blobs import ITEM_BYTES, Array

NAME = "plain"


def tensors(memory: NDArray[np.uint8], pages: Sequence[int], tokens: int, dtype: str) -> dict[str, Array]:
    """An entry's tensors, with the places of their bytes in paged memory: to write them from there, or to read them
    there. Nothing is copied.

    Args:
        memory: the bytes of paged memory, contiguous, [layers, 2, pages, kv_heads, page_size, bytes of a head's
            vector].
        pages: the entry's pages, in order.
        tokens: how many tokens the entry has.
        dtype: torch name of the elements' dtype.
    """
    layers, _, count, kv_heads, page_size, width = memory.shape
    item = ITEM_BYTES[dtype]
    flat, block = memory.reshape(-1).data, page_size * width
    lengths = [width * min(page_size, tokens - place * page_size) for place in range(len(pages))]
    heads = range(kv_heads)
    starts = [[(page * kv_heads + head) * block for page in pages] for head in heads]
    shape = (2, kv_heads, tokens, width // item)
    found = {}
    for layer in range(layers):
        halves = [(2 * layer + half) * count * kv_heads * block for half in (0, 1)]
        pieces = [
            flat[half + start : half + start + length]
            for half in halves
            for head in heads
            for start, length in zip(starts[head], lengths, strict=True)
        ]
        found[f"layer.{layer:03d}"] = Array(dtype, shape, pieces)
    return found
