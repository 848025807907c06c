"""From runs of new tokens to batches for the model: computing missing entries, and the tail of a request.

Knows nothing about files, text or composition modes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from braidsdk.kernels.paging import PagedSegment, Request, slots_of
from braidsdk.models.base import Batch, Model
from braidsdk.pool import Pool

BATCH_TOKENS = 2048
"""New tokens that one forward pass computes at most; bounds the memory of activations."""


@dataclass(frozen=True)
class Run:
    """Consecutive new tokens of one entry or tail.

    Attributes:
        token_ids: the tokens.
        context: what they see beside the entry they belong to.
        pages: where that entry lies, int64 [pages].
        start: index of the first of them in that entry.
        origin: absolute position of the entry's token 0.
    """

    token_ids: tuple[int, ...]
    context: tuple[PagedSegment, ...]
    pages: Tensor
    start: int
    origin: int


def compute(model: Model, pool: Pool, runs: Sequence[Run]) -> None:
    """Compute the KV of runs, in batches of at most `BATCH_TOKENS` tokens. A run may see an earlier one."""
    for batch in _batches(runs):
        model.forward(make_batch(batch, pool), pool.kv, None)


def compute_logits(model: Model, pool: Pool, run: Run) -> Tensor:
    """Compute a run, and the logits after its last token: [vocab_size]."""
    *first, last = _batches([run])
    for batch in first:
        model.forward(make_batch(batch, pool), pool.kv, None)
    rows = torch.tensor([sum(len(part.token_ids) for part in last) - 1], device=model.device)
    logits = model.forward(make_batch(last, pool), pool.kv, rows)
    if logits is None:
        raise RuntimeError("the model gave no logits although a row was asked for")
    return logits[0]


def _batches(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Pack runs into batches, in order; a run that does not fit is cut."""
    batch: list[Run] = []
    room = BATCH_TOKENS
    for run in runs:
        rest = run
        while rest.token_ids:
            part = replace(rest, token_ids=rest.token_ids[:room])
            rest = replace(rest, token_ids=rest.token_ids[room:], start=rest.start + len(part.token_ids))
            batch.append(part)
            room -= len(part.token_ids)
            if not room:
                yield batch
                batch, room = [], BATCH_TOKENS
    if batch:
        yield batch


def make_batch(runs: Sequence[Run], pool: Pool) -> Batch:
    """The tensors of one forward pass over these runs."""
    device = pool.kv.device
    frames = [torch.arange(run.start, run.start + len(run.token_ids), device=device) for run in runs]
    requests = []
    row = lowest = highest = 0
    for run in runs:
        stop = run.start + len(run.token_ids)
        own = PagedSegment(run.pages, 0, stop, run.origin)
        requests.append(Request(slice(row, row + len(run.token_ids)), (*run.context, own)))
        row += len(run.token_ids)
        highest = max(highest, run.origin + stop)
        lowest = min(lowest, *(segment.origin for segment in requests[-1].segments))
    return Batch(
        token_ids=torch.tensor([i for run in runs for i in run.token_ids], device=device),
        positions=torch.cat([frame + run.origin for frame, run in zip(frames, runs, strict=True)]),
        frame_positions=torch.cat(frames),
        slots=torch.cat(
            [slots_of(run.pages, run.start, run.start + len(run.token_ids), pool.page_size) for run in runs]
        ),
        requests=tuple(requests),
        limit=highest - lowest,
    )
