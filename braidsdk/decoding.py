"""Tokens of running requests, one after another, on any device: a batch of rows, one per request.

Call everything here within `Engine.working()`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from braidsdk.encode import Run, compute_logits
from braidsdk.errors import NumericsError
from braidsdk.kernels.paging import PagedSegment
from braidsdk.models.base import Model
from braidsdk.pool import Pool
from braidsdk.sampling import Sampler


@dataclass(eq=False)
class Row:
    """One running request.

    Attributes:
        sampler: chooses its tokens.
        context: what it sees beside its tail.
        pages: where its tail lies, int64 [pages], on the CPU.
        origin: absolute position of the tail's token 0.
        reserved: tokens that its pages are meant for.
        done: tokens of the tail that are computed.
        last: the id chosen last; not computed yet.
        ready: ids that were chosen and not asked for.
        failure: why there are no more of them.
    """

    sampler: Sampler
    context: tuple[PagedSegment, ...]
    pages: Tensor
    origin: int
    reserved: int
    done: int = 0
    last: int = 0
    ready: deque[int] = field(default_factory=deque)
    failure: NumericsError | None = None

    def run(self, token_ids: Sequence[int]) -> Run:
        """The next tokens of its tail, to be computed."""
        return Run(tuple(token_ids), self.context, self.pages, self.done, self.origin)

    def choose(self, logits: Tensor) -> None:
        """Take the next token from its logits, [vocab_size]; a failure is this request's alone, raised by `pop`."""
        self._note(lambda: self.sampler.pick(logits))

    def take(self, token: int, finite: bool) -> None:
        """Take the next token as the device has chosen it; a failure is raised by `pop`."""
        self._note(lambda: self.sampler.take(token, finite))

    def _note(self, choose: Callable[[], int]) -> None:
        try:
            self.last = choose()
        except NumericsError as error:
            self.failure = error
        else:
            self.ready.append(self.last)

    def pop(self) -> int:
        """The next token that was chosen and not asked for.

        Raises:
            NumericsError: it could not be chosen.
        """
        if not self.ready and self.failure:
            raise self.failure
        return self.ready.popleft()

    @property
    def waits(self) -> bool:
        """Whether its next token is not there yet."""
        return not self.ready and self.failure is None


class Decoder(Protocol):
    """Requests that go on together, a token each per step."""

    def admit(self, row: Row, tail: Sequence[int]) -> None:
        """Compute a request's tail and choose its first token: `next` gives it."""
        ...

    def next(self, row: Row) -> int:
        """The next token of an admitted request; steps all of them where it is not there yet.

        Raises:
            NumericsError: the model gave logits that are not finite.
        """
        ...

    def retire(self, row: Row) -> None:
        """Leave a request out of further steps. Again is harmless."""
        ...


class EagerDecoder:
    """A forward pass at a time, on any device."""

    def __init__(self, model: Model, pool: Pool) -> None:
        self._model, self._pool = model, pool
        self._rows: list[Row] = []

    def admit(self, row: Row, tail: Sequence[int]) -> None:
        row.choose(compute_logits(self._model, self._pool, [row.run(tail)])[0])
        row.done += len(tail)
        self._rows.append(row)

    def next(self, row: Row) -> int:
        if row.waits:
            going = [each for each in self._rows if each.failure is None]
            runs = [each.run((each.last,)) for each in going]
            for each, logits in zip(going, compute_logits(self._model, self._pool, runs), strict=True):
                each.done += 1
                each.choose(logits)
        return row.pop()

    def retire(self, row: Row) -> None:
        if row in self._rows:
            self._rows.remove(row)
