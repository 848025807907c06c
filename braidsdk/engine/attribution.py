"""Which segments the tokens of an answer looked at when they were chosen.

Decoding keeps no weights. So when an answer is complete, its rows go through the model once more, over the keys and
values that lie there already, and nothing is written. Rows don't depend on each other then, so they go in pieces.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.engine.batch import Run, make_batch
from braidsdk.models.base import Model

PIECE_ROWS = 64
"""Rows of one piece; bounds how long it keeps other requests waiting."""


def layers_of(count: int) -> range:
    """The layers that tell best where an answer comes from, of a model with `count` layers: from 54 to 88 % of its
    depth. Early ones look at neighbours, late ones at what is to be written."""
    return range(count * 13 // 24, max(count * 21 // 24, count * 13 // 24 + 1))


class Attribution:
    """The attention of one answer, computed piece by piece."""

    def __init__(self, model: Model, pool: Pool, run: Run, owners: Sequence[int] = ()) -> None:
        """Prepare it.

        Args:
            model, pool: of the engine.
            run: the tokens after which each token of the answer was chosen: the question's last one, and all of the
                answer but its last. Their keys and values are in the pool.
            owners: for each of the last segments of its context, the one whose share it belongs to.
        """
        self._model, self._pool, self._owners = model, pool, torch.tensor(owners, dtype=torch.int64)
        self._left: Run | None = run
        self._parts: list[Tensor] = []

    def advance(self) -> Sequence[Sequence[float]] | None:
        """Compute the next piece.

        Returns:
            With the last one, for each token of the answer the share of each segment, at last that of question and
            answer themselves; None before.
        """
        if self._left:
            piece, self._left = self._left.cut(PIECE_ROWS)
            batch, layers = make_batch([piece], self._pool), layers_of(self._model.config.layers)
            self._parts.append(self._model.attention_shares(batch, self._pool.kv, layers))
        return None if self._left else self._by_owner(torch.cat(self._parts).cpu()).tolist()

    def _by_owner(self, shares: Tensor) -> Tensor:
        """Shares, [tokens, segments and the tail], without the columns that belong to others."""
        count = shares.shape[1] - 1 - len(self._owners)
        whole = shares[:, :count].index_add(1, self._owners, shares[:, count:-1])
        return torch.cat((whole, shares[:, -1:]), 1)
