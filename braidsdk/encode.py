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

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""New tokens that one forward pass computes at most, by device; bounds the memory of activations."""


@dataclass(frozen=True)
class Run:
    """Consecutive new tokens of one entry or tail.

    Attributes:
        token_ids: the tokens.
        context: what they see beside the entry they belong to.
        pages: where that entry lies, int64 [pages], on the CPU.
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
    for batch, _ in _batches(runs, BATCH_TOKENS[model.device.type]):
        model.forward(make_batch(batch, pool), pool.kv, None)


def compute_logits(model: Model, pool: Pool, runs: Sequence[Run]) -> Tensor:
    """Compute runs, and the logits after the last token of each: [runs, vocab_size]."""
    found = []
    for batch, ends in _batches(runs, BATCH_TOKENS[model.device.type]):
        rows = torch.tensor(ends, device=model.device) if ends else None
        logits = model.forward(make_batch(batch, pool), pool.kv, rows)
        if logits is not None:
            found.append(logits)
    return torch.cat(found) if len(found) > 1 else found[0]


def _batches(runs: Iterable[Run], size: int) -> Iterator[tuple[list[Run], list[int]]]:
    """Pack runs into batches of `size` tokens, in order; a run that does not fit is cut. With each batch the rows that
    end a run."""
    batch: list[Run] = []
    ends: list[int] = []
    room = size
    for run in runs:
        rest = run
        while rest.token_ids:
            part = replace(rest, token_ids=rest.token_ids[:room])
            rest = replace(rest, token_ids=rest.token_ids[room:], start=rest.start + len(part.token_ids))
            batch.append(part)
            room -= len(part.token_ids)
            if not rest.token_ids:
                ends.append(size - room - 1)
            if not room:
                yield batch, ends
                batch, ends, room = [], [], size
    if batch:
        yield batch, ends


def make_batch(runs: Sequence[Run], pool: Pool) -> Batch:
    """The tensors of one forward pass over these runs."""
    frames = [torch.arange(run.start, run.start + len(run.token_ids)) for run in runs]
    requests = []
    row = lowest = highest = 0
    for run in runs:
        stop = run.start + len(run.token_ids)
        own = PagedSegment(run.pages, 0, stop, run.origin)
        requests.append(Request(slice(row, row + len(run.token_ids)), (*run.context, own)))
        row += len(run.token_ids)
        highest = max(highest, run.origin + stop)
        lowest = min(lowest, *(segment.origin for segment in requests[-1].segments))
    slots = [slots_of(run.pages, run.start, run.start + len(run.token_ids), pool.page_size) for run in runs]
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
    )
