"""The codec "plain": keys and values as the model computes them, in its dtype.

The tensors are `layer.000`, `layer.001`, ..., each [2 (K, V), kv_heads, tokens, head_dim]. They know no pages, so
devices with other pages share files, and no padding is written.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from braidsdk.store.blobs import ITEM_BYTES, Array

NAME = "plain"


def tensors(
    memory: NDArray[np.uint8], pages: Sequence[int], tokens: int, dtype: str, offset: int = 0
) -> dict[str, Array]:
    """An entry's tensors, with the places of their bytes in paged memory: to write them from there, or to read them
    there. Nothing is copied.

    Args:
        memory: the bytes of paged memory, contiguous, [layers, 2, pages, kv_heads, page_size, bytes of a head's
            vector].
        pages: the entry's pages, in order.
        tokens: how many tokens the entry has.
        dtype: torch name of the elements' dtype.
        offset: place of the first token, counted from the start of the first page.
    """
    layers, _, count, kv_heads, page_size, width = memory.shape
    item = ITEM_BYTES[dtype]
    flat, block = memory.reshape(-1).data, page_size * width
    firsts = [max(offset - index * page_size, 0) for index in range(len(pages))]
    stops = [min(page_size, offset + tokens - index * page_size) for index in range(len(pages))]
    heads = range(kv_heads)
    ends = [
        [
            tuple(((page * kv_heads + head) * page_size + place) * width for place in bounds)
            for page, *bounds in zip(pages, firsts, stops, strict=True)
        ]
        for head in heads
    ]
    shape = (2, kv_heads, tokens, width // item)
    found = {}
    for layer in range(layers):
        halves = [(2 * layer + half) * count * kv_heads * block for half in (0, 1)]
        pieces = [flat[half + start : half + stop] for half in halves for head in heads for start, stop in ends[head]]
        found[f"layer.{layer:03d}"] = Array(dtype, shape, pieces)
    return found
