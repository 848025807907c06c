"""One unit of work for the engine: a question, a registration, or a look at resident entries.

The engine's thread writes to a request, and its reader's thread reads from it. They share two things that are safe
without a lock: a list that only grows, and a wake-up that says that something has changed.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from braidsdk.compose.composition import Composition
from braidsdk.compose.repairs import Linked, overlay_tokens
from braidsdk.engine.scheduler import ENDED, Job
from braidsdk.errors import BraidError
from braidsdk.prompt.answer_text import AnswerText
from braidsdk.store.keys import EntryKey
from braidsdk.types import Certificate, Timings, Usage

if TYPE_CHECKING:
    from torch import Tensor

    from braidsdk.cache.resident import Resident
    from braidsdk.engine.sampling import SamplingParams

Then = Callable[[Sequence["Resident"], "Tensor | None"], object]
"""What the engine's thread does with a request's resident entries, one per segment, and with the logits after its tail
and after each forced token: [1 + forced tokens, vocab_size], or None without a tail."""


@dataclass(frozen=True)
class Outcome:
    """The results of a finished question, besides its text.

    Attributes:
        usage, timings, finish_reason: as in `Answer`.
        shares: if the sources were asked for, the share of attention that each token of the answer gave to each
            segment, and at last to question and answer themselves.
    """

    usage: Usage
    timings: Timings
    finish_reason: Literal["stop", "length"]
    shares: Sequence[Sequence[float]] | None = None


@dataclass
class Clock:
    """When a request passed its stages, in seconds of `time.perf_counter`. 0.0 means not yet, or never.

    Attributes:
        admitted: when it got its memory.
        ready: when the entries that the store holds were loaded.
        entries: when the last of its missing entries was computed.
        computed: when its prefill was computed.
        first_token, last_token: when these tokens were chosen.
    """

    admitted: float = 0.0
    ready: float = 0.0
    entries: float = 0.0
    computed: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def compute_ms(self) -> float:
        """How long computing missing entries took."""
        return (self.entries - self.ready) * 1e3 if self.entries else 0.0


@dataclass(eq=False, kw_only=True)
class Request(Job):
    """One unit of work; see the module.

    Attributes:
        namespace: whose entries they are.
        composition: its segments, and its tail.
        keys: the keys of its segments' entries.
        params: how tokens are chosen; None generates none.
        then: what to do after its prefill, instead of generating tokens.
        forced: tokens of a given answer, which are computed behind the tail for `then`.
        computes: keys of entries that the store is known to lack. They are written even if they are resident.
        counted: whether its entries count as hits and misses.
        fidelity: what was measured of its mode.
        streamed: whether its reader is woken for each token, or only at the end.
        sources: whether the answer's attention to each segment is wanted.
        text: follows the answer's text, if stop strings can end it.
        wake: the engine's thread calls it when there is something to read; it must not block. What it returns is called
            after all requests of the same step were woken, once if several return the same.
        tokens: ids generated so far.
        clock: see `Clock`.
        computed_tokens: context tokens that were computed for it.
        stored_tokens: those of them whose entries go to the store.
        exact_tokens: context tokens that were there, as in a full prefill, and were not computed again.
        repaired_tokens: context tokens that were computed again for it.
        twice_tokens: those of them that `computed_tokens` counts, too.
        budget: that work, choosing the tokens included, as a share of computing all tokens of its chunks in all layers.
        outcome: the results of a finished question.
        value: what `then` returned.
        error: why it failed.
    """

    namespace: str
    composition: Composition
    keys: tuple[EntryKey, ...] = ()
    params: "SamplingParams | None" = None
    then: Then | None = None
    forced: tuple[int, ...] = ()
    computes: frozenset[EntryKey] = frozenset()
    counted: bool = True
    fidelity: Certificate | None = None
    streamed: bool = False
    sources: bool = False
    text: AnswerText | None = None
    wake: Callable[[], Callable[[], None] | None] | None = None
    tokens: list[int] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    computed_tokens: int = 0
    stored_tokens: int = 0
    exact_tokens: int = 0
    repaired_tokens: int = 0
    twice_tokens: int = 0
    budget: float = 0.0
    outcome: Outcome | None = None
    value: object = None
    error: BaseException | None = None
    _bell: "SimpleQueue[None]" = field(default_factory=SimpleQueue)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ENDED

    @property
    def usage(self) -> Usage:
        """Where its prompt's tokens came from, once its first token is there."""
        prompt = self.composition.tokens
        computed = self.computed_tokens - self.twice_tokens + len(self.composition.tail)
        return Usage(
            prompt_tokens=prompt,
            cached_tokens=prompt - computed - self.repaired_tokens,
            computed_tokens=computed,
            repaired_tokens=self.repaired_tokens,
            completion_tokens=len(self.tokens),
            budget=self.budget,
            exact_tokens=self.exact_tokens,
            stored_tokens=self.stored_tokens,
        )

    @property
    def keeps(self) -> list[bool]:
        """For each segment, whether its entry is written to the store once it is computed."""
        return [segment.keep for segment in self.composition.segments]

    @cached_property
    def reserved(self) -> int:
        """The most tokens that its tail and its answer can have."""
        return len(self.composition.tail) + len(self.forced) + (self.params.max_new_tokens if self.params else 0)

    @cached_property
    def scratch(self) -> int:
        """Tokens for which it takes memory until its first token: where repaired tokens are computed."""
        return self.composition.tail_origin if self.overlay else 0

    @cached_property
    def overlay(self) -> int:
        """The most tokens that it repairs, and a shift for each of its segments, if they have any. Without a question
        it repairs what is the same for all, if that is kept."""
        composition = self.composition
        repairs = composition.tail or (composition.keeps_overlay and isinstance(composition.repair, Linked))
        return overlay_tokens(composition) if repairs else 0

    def fail(self, error: BaseException) -> None:
        """Keep the error that its reader will raise, and no value. For the engine's thread."""
        self.error, self.value = without_frames(error), None

    def ring(self) -> Callable[[], None] | None:
        """Wake the reader; returns what `wake` does. For the engine's thread."""
        if self.wake:
            return self.wake()
        self._bell.put(None)
        return None

    def wait(self, seen: int | None = None) -> None:
        """Block until it has ended or has more than `seen` tokens. Ctrl-C interrupts the wait."""
        while not self.ended and (seen is None or len(self.tokens) <= seen):
            self._bell.get()

    def result(self) -> object:
        """Wait until it has ended, and return what `then` returned.

        Raises:
            BaseException: the error with which it failed.
        """
        self.wait()
        if self.error is not None:
            raise self.error
        return self.value


def without_frames(error: BaseException) -> BaseException:
    """An error for another thread, without the frames that it and its causes passed. They hold tensors, which would
    live as long as the error does. And a daemon thread that frees a tensor while the interpreter exits ends the process
    by SIGABRT. What was not expected keeps its traceback as a note."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if each.__traceback__ and not isinstance(each, BraidError):
            each.add_note("In another thread:\n" + "".join(traceback.format_tb(each.__traceback__)).rstrip())
        each.__traceback__ = None
        left += [each.__cause__, each.__context__, *(each.exceptions if isinstance(each, BaseExceptionGroup) else ())]
    return error
