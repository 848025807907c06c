"""Makes a batch for the model from runs of new tokens.

Knows nothing about files, text or composition modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.kernels.paging import PagedSegment, Request, Shift, slots_of
from braidsdk.models.base import Batch, Model


@dataclass(frozen=True)
class Run:
    """New tokens of one entry or tail.

    Attributes:
        token_ids: the tokens.
        context: the segments that they see besides the entry that they belong to.
        pages: pages of that entry, int64 [pages], on the CPU.
        start: index of the first token in that entry.
        origin: absolute position of the entry's token 0.
        places: indices in the entry of tokens that are not consecutive, ascending, int64 [tokens], on the CPU; all
            others of the entry are hidden. None: they follow one another from `start`.
        hidden: with `places`, what is hidden of the entry, bool [tokens of the entry], on the CPU.
        shifts: what comes of these tokens; then all of them are computed in one pass.
        offset: where on its first page the entry's token 0 is.
    """

    token_ids: tuple[int, ...]
    context: tuple[PagedSegment, ...]
    pages: Tensor
    start: int
    origin: int
    places: Tensor | None = None
    hidden: Tensor | None = None
    shifts: tuple[Shift, ...] = ()
    offset: int = 0

    def cut(self, tokens: int) -> "tuple[Run, Run | None]":
        """Split it into the first `tokens` tokens, or all of them if they must be in one pass, and the rest. The rest
        is None if nothing is left."""
        if tokens >= len(self.token_ids) or self.shifts:
            return self, None
        if self.places is not None:
            first, second = self.places[:tokens], self.places[tokens:]
            rest = replace(self, token_ids=self.token_ids[tokens:], places=second)
            return replace(self, token_ids=self.token_ids[:tokens], places=first), rest
        rest = replace(self, token_ids=self.token_ids[tokens:], start=self.start + tokens)
        return replace(self, token_ids=self.token_ids[:tokens]), rest

    @property
    def last(self) -> int:
        """The index of its last token in its entry."""
        return self.start + len(self.token_ids) - 1 if self.places is None else int(self.places[-1])

    def entry(self, stop: int) -> PagedSegment:
        """The first `stop` tokens of its entry."""
        offset = self.offset
        return PagedSegment(self.pages, offset, offset + stop, self.origin, self.hidden, offset=offset)

    @cached_property
    def frame(self) -> Tensor:
        """The index of each token in its entry, int64 [tokens], on the CPU."""
        if self.places is not None:
            return self.places
        return torch.arange(self.start, self.start + len(self.token_ids))


def forward(model: Model, pool: Pool, runs: Sequence[Run], wanted: Sequence[int] = ()) -> Tensor | None:
    """One pass of the model over runs. A run may see an earlier one.

    Args:
        model: the model.
        pool: takes the keys and values.
        runs: at least one.
        wanted: for each run, after how many of its last tokens logits are wanted. If left out, after none.

    Returns:
        Logits [wanted tokens, vocab_size], run after run; None if none are wanted.
    """
    rows: list[int] = []
    stop = 0
    for run, count in zip(runs, wanted, strict=False):
        stop += len(run.token_ids)
        rows += range(stop - count, stop)
    return model.forward(make_batch(runs, pool), pool.kv, torch.tensor(rows, device=model.device) if rows else None)


def make_batch(runs: Sequence[Run], pool: Pool) -> Batch:
    """The tensors of one forward pass over these runs."""
    frames = [run.frame for run in runs]
    requests = []
    row = lowest = highest = 0
    for run in runs:
        stop = run.last + 1
        requests.append(Request(slice(row, row + len(run.token_ids)), (*run.context, run.entry(stop))))
        row += len(run.token_ids)
        highest = max(highest, run.origin + stop)
        lowest = min(lowest, *(segment.origin for segment in requests[-1].segments))
    slots = [slots_of(run.pages, frame + run.offset, pool.page_size) for run, frame in zip(runs, frames, strict=True)]
    columns = (
        torch.tensor([i for run in runs for i in run.token_ids]),
        torch.cat([frame + run.origin for frame, run in zip(frames, runs, strict=True)]),
        torch.cat(frames),
        torch.cat(slots),
    )
    token_ids, positions, frame_positions, slot = torch.stack(columns).to(pool.kv.device)  # in one copy
    return Batch(
        token_ids=token_ids,
        positions=positions,
        frame_positions=frame_positions,
        slots=slot,
        requests=tuple(requests),
        limit=highest - lowest,
        shifts=tuple(shift for run in runs for shift in run.shifts),
    )
