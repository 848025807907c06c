"""A composed context as a cache of another library, transformers.

In that cache every key stands at its absolute position. So each key is rotated from its segment's frame by the
segment's origin s: R(s) R(j) = R(s + j).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.cache.resident import Resident
from braidsdk.compose.composition import Segment
from braidsdk.kernels.rope import rotate
from braidsdk.models.base import Model

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig


def to_dynamic_cache(
    model: Model,
    pool: Pool,
    segments: Sequence[Segment],
    entries: Sequence[Resident],
    config: "PretrainedConfig | None",
) -> "DynamicCache":
    """Copy entries out of the pool, with their keys at absolute positions.

    Args:
        model: the model that computed the entries.
        pool: where they lie.
        segments: their places, contiguous from position 0.
        entries: one per segment.
        config: the config of the transformers model that will read the cache, or None.

    Returns:
        Keys and values of each layer, [1, kv_heads, tokens, head_dim], in the model's dtype and on its device.
    """
    from transformers import DynamicCache

    turns = [_turn(model, segment.origin) for segment in segments]
    layers = []
    for memory in pool.kv:
        parts = [_tokens(memory, entry) for entry in entries]
        keys = [rotate(part[0], *turn) for part, turn in zip(parts, turns, strict=True)]
        layers.append(tuple(torch.cat(own).transpose(0, 1)[None] for own in (keys, [part[1] for part in parts])))
    return DynamicCache(layers, config=config)


def _tokens(memory: Tensor, entry: Resident) -> Tensor:
    """An entry's keys and values in one layer: [2, tokens, kv_heads, head_dim]."""
    return memory[:, entry.pages, :, entry.places].transpose(2, 3).flatten(1, 2)[:, : entry.tokens]


def _turn(model: Model, origin: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at a position, each [1, head_dim / 2].

    A table's entries may hold a factor (YaRN). The keys have that factor already, so only the direction is used.
    """
    cos, sin = model.rotary.at(torch.tensor([origin], device=model.device), origin + 1)
    length = torch.hypot(cos, sin)
    return cos / length, sin / length
