"""A step of the model for many requests: pieces of prefill, and a token for each row that decodes.

Knows nothing about requests' states, text or files. For the engine's thread, which is in inference mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.engine.batch import Run, forward
from braidsdk.engine.sampling import Sampler
from braidsdk.kernels.paging import PagedSegment
from braidsdk.kernels.sample import Choices, sample
from braidsdk.models.base import Model


@dataclass(eq=False)
class Row:
    """One request's tail and answer.

    Attributes:
        slot: its place in the running batch.
        sampler: chooses its tokens.
        context: the segments that it sees besides its tail.
        pages: pages of its tail, int64 [pages], on the CPU.
        origin: absolute position of the tail's token 0.
        reserved: how many tokens its pages are meant for.
        done: how many tokens of the tail have their keys and values computed.
        last: the id that was chosen last and is not computed yet. Only used if tokens come to the host one by one.
    """

    slot: int
    sampler: Sampler
    context: tuple[PagedSegment, ...]
    pages: Tensor
    origin: int
    reserved: int
    done: int = 0
    last: int = 0

    def run(self, token_ids: Sequence[int]) -> Run:
        """A run of the next tokens of its tail."""
        return Run(tuple(token_ids), self.context, self.pages, self.done, self.origin)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a request's prefill.

    Attributes:
        run: the tokens to compute.
        row: if they end a tail, the row that gets its first token then.
        logits: after how many of the last tokens logits are wanted.
    """

    run: Run
    row: Row | None = None
    logits: int = 0

    @property
    def rows(self) -> int:
        """After how many of its last tokens logits are computed."""
        return self.logits or int(self.row is not None)


@dataclass(frozen=True)
class Chosen:
    """A row's next token, and whether its logits were finite. If they were not, the token means nothing."""

    row: Row
    token: int
    finite: bool


class Results(Protocol):
    """The results of a step, which may not be there yet."""

    def take(self) -> list[Chosen]:
        """Wait for the tokens and return them."""
        ...

    @property
    def logits(self) -> Sequence[Tensor]:
        """Logits [wanted tokens, vocab_size] for each piece that wanted them, in order."""
        ...


class Runner(Protocol):
    """How steps are computed on one device."""

    ahead: bool
    """Whether a step can be launched before the results of the previous one were taken."""

    def launch(self, pieces: Sequence[Piece], rows: Sequence[Row]) -> Results:
        """Compute pieces and the next token of rows, or start to. Rows that were given before and are not given now
        have left. If it is launched again after an error, it gives the same results as without the error."""
        ...


@dataclass(frozen=True)
class Done:
    """Results that are there."""

    chosen: list[Chosen]
    logits: Sequence[Tensor]

    def take(self) -> list[Chosen]:
        return self.chosen


class EagerRunner:
    """Computes a whole step as one pass of the model, on any device."""

    ahead = False

    def __init__(self, model: Model, pool: Pool) -> None:
        self._model, self._pool = model, pool

    def launch(self, pieces: Sequence[Piece], rows: Sequence[Row]) -> Done:
        runs = [*(row.run((row.last,)) for row in rows), *(piece.run for piece in pieces)]
        wanted = [1] * len(rows) + [piece.rows for piece in pieces]
        logits = forward(self._model, self._pool, runs, wanted)
        if logits is None:
            return Done([], [])
        enders = [piece for piece in pieces if piece.rows]
        choosing: list[Row | None] = [*rows]
        for piece in enders:
            choosing += [*[None] * (piece.rows - 1), piece.row]
        chosen = choose(logits, choosing)
        for row in rows:
            row.done += 1
        for piece in enders:
            if piece.row:
                piece.row.done = piece.run.start + len(piece.run.token_ids)
        for each in chosen:
            each.row.last = each.token
        given = logits[len(rows) :].split([piece.rows for piece in enders])
        return Done(chosen, [one for one, piece in zip(given, enders, strict=True) if piece.logits])


def choose(logits: Tensor, rows: Sequence[Row | None]) -> list[Chosen]:
    """Choose a token for each row from its logits, [rows, vocab_size]. Rows that are None get none."""
    finite = torch.isfinite(logits).all(-1).tolist()
    ids = logits.argmax(-1)
    samplers = {at: row.sampler for at, row in enumerate(rows) if row and not row.sampler.greedy}
    if samplers:
        places = list(samplers)
        choices = Choices.greedy(torch.zeros_like(logits[places], dtype=torch.bool))
        for at, sampler in enumerate(samplers.values()):
            sampler.describe(choices, at)
        ids[places] = sample(logits[places].float(), choices)[0]
    return [Chosen(row, token, good) for row, token, good in zip(rows, ids.tolist(), finite, strict=True) if row]
