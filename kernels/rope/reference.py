"""Rotary position embedding, torch reference (Su et al. 2021, arXiv:2104.09864; halves are rotated, as in Llama)."""

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of the angles `position * inv_freq`, grown on demand.

    Angles are computed in float64 from the config's float32 inverse frequencies, so that high positions lose nothing.
    """

    def __init__(self, inv_freq: Tensor, attention_factor: float, dtype: torch.dtype, device: torch.device) -> None:
        """Args:
        inv_freq: radians per position, float32 [head_dim / 2].
        attention_factor: factor on the cosines and sines (YaRN); 1.0 otherwise.
        dtype: dtype of the table: float32, or float64 for a float64 model.
        device: where the table lies.
        """
        self._inv_freq = inv_freq.to("cpu", torch.float64)
        self.attention_factor = attention_factor
        self._dtype, self._device = dtype, device
        self._cos = self._sin = torch.empty(0, inv_freq.numel(), dtype=dtype, device=device)

    def at(self, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions`, each [..., head_dim / 2].

        Args:
            positions: int64 [...], none negative.
            limit: a bound that every position is below, known without reading the tensor.
        """
        cos, sin = self.table(limit)
        return cos[positions], sin[positions]

    def table(self, limit: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position below `limit`, and perhaps more, each [positions, head_dim / 2]."""
        if limit > self._cos.shape[0]:
            size = max(limit, 2 * self._cos.shape[0], 1024)
            angles = torch.arange(size, dtype=torch.float64)[:, None] * self._inv_freq
            self._cos = (angles.cos() * self.attention_factor).to(self._device, self._dtype)
            self._sin = (angles.sin() * self.attention_factor).to(self._device, self._dtype)
        return self._cos, self._sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their token's angle; in the table's precision, rounded once to `x`'s dtype.

    Args:
        x: [tokens, heads, head_dim].
        cos, sin: [tokens, head_dim / 2].

    Returns:
        [tokens, heads, head_dim], the dtype of `x`.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
