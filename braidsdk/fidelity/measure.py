"""Asks questions in composition modes, and in full prefill of the same tokens, and compares what comes out.

Full prefill is the mode "exact". Of the other modes nothing is known here but their names.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from braidsdk.chunks import Chunks
from braidsdk.compose.composition import Composition
from braidsdk.compose.repairs import Repair
from braidsdk.context import Context
from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request
from braidsdk.engine.sampling import resolve
from braidsdk.engine.scheduler import Priority
from braidsdk.errors import InputError, WindowExceededError, shown
from braidsdk.fidelity.outcomes import Outcome, Outcomes, key_of
from braidsdk.fidelity.questions import Question
from braidsdk.prompt.text import normalise
from braidsdk.store import chunk_id
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM, Answer, Chunk, Mode

PASSAGE = {"braidsdk.fidelity": "passage"}
"""Metadata of a passage while its question is measured, beside the number of the process."""

REFERENCE: Mode = "exact"
"""The mode that equals full prefill."""


class Compose(Protocol):
    """`Braid.compose`."""

    def __call__(self, chunks: Sequence[Chunk | str], *, mode: str | Repair, keep: bool | None = None) -> Context: ...


class Register(Protocol):
    """`Braid.register_many`."""

    def __call__(self, texts: Sequence[str], *, metadata: Sequence[Mapping[str, Any]]) -> object: ...


@dataclass(frozen=True)
class Case:
    """A question, and what it is asked over.

    Attributes:
        number: its place among the questions that were given.
        question: the question.
        chunk_ids: ids of the chunks, in order.
        texts: those of them that are registered for this question alone.
        context_chunks: how many are not the system prompt.
        anchor: whether a system prompt stands first.
    """

    number: int
    question: Question
    chunk_ids: tuple[str, ...]
    texts: tuple[str, ...]
    context_chunks: int
    anchor: bool


@dataclass(frozen=True)
class Measured:
    """All outcomes of one question, by mode."""

    case: Case
    outcomes: dict[str, Outcome]


def drawn(questions: Sequence[Question], sample: int | None, seed: int) -> list[int]:
    """Places of the questions that are asked, ascending. A larger sample of the same seed holds a smaller one.

    Raises:
        InputError: there are not so many.
    """
    if sample is None:
        return list(range(len(questions)))
    if type(sample) is not int or not 1 <= sample <= len(questions):
        raise InputError(
            f"sample must be a whole number from 1 to {len(questions)}, the number of questions; got {shown(sample)}."
        )
    places = list(range(len(questions)))
    random.Random(seed).shuffle(places)
    return sorted(places[:sample])


def held_out(questions: Sequence[Question], count: int, seed: int) -> list[int]:
    """Places of so many questions at most, ascending: those that `drawn` draws last."""
    places = list(range(len(questions)))
    random.Random(seed).shuffle(places)
    return sorted(places[-count:])


def find_cases(
    engine: Engine, chunks: Chunks, selected: Sequence[Chunk], questions: Sequence[Question], places: Sequence[int]
) -> list[Case]:
    """What each question is asked over. A system prompt that stands first in `selected` stands before passages and
    chunks of a question's own, too.

    Raises:
        UnknownChunkError: a question names a chunk that is not there.
        InputError: a question has nothing to be asked over.
    """
    first = selected[:1] if selected and selected[0].level == LEVEL_SYSTEM else selected[:0]
    cases = []
    for place in places:
        question = questions[place]
        texts: tuple[str, ...] = ()
        if question.passages is not None:
            texts = tuple(normalise(each) for each in question.passages)
            own = [chunk_id(engine.namespace, LEVEL_CONTEXT, each) for each in texts]
            ids, count, anchor = [*(each.id for each in first), *own], len(own), bool(first)
        else:
            found = chunks.resolve(question.chunks) if question.chunks is not None else tuple(selected)
            if question.chunks is not None and found[0].level != LEVEL_SYSTEM:
                found = (*first, *found)
            ids = [each.id for each in found]
            count = sum(each.level == LEVEL_CONTEXT for each in found)
            anchor = bool(found) and found[0].level == LEVEL_SYSTEM
        if not count:
            raise InputError(
                f"Question {place + 1} must be asked over at least one context chunk; got none. Select chunks, or "
                "give it chunks or passages of its own."
            )
        cases.append(Case(place, question, tuple(ids), texts, count, anchor))
    return cases


class Bench:
    """Measures cases on one open model."""

    def __init__(
        self,
        engine: Engine,
        chunks: Chunks,
        *,
        compose: Compose,
        register: Register,
        max_new_tokens: int,
    ) -> None:
        """Prepare.

        Args:
            engine, chunks: those of a Braid.
            compose: its `compose`.
            register: registers texts as context chunks with their metadata, and computes nothing.
            max_new_tokens: the most tokens of an answer.
        """
        self._engine, self._chunks, self._compose, self._register = engine, chunks, compose, register
        self._most = max_new_tokens
        self._outcomes = Outcomes(engine.store.path / "outcomes.jsonl")
        self._is_warm = False
        self._delete(lambda chunk: not psutil.pid_exists(chunk.metadata["process"]))  # of runs that were killed

    def measure(
        self, cases: Sequence[Case], modes: Sequence[str], on_progress: Callable[[int, int], None]
    ) -> Iterator[Measured]:
        """Measure full prefill and other modes, question by question, as far as they are not known yet.

        Args:
            cases: what is asked.
            modes: names of modes, without full prefill's.
            on_progress: called with the cases done and those to be done.

        Raises:
            BraidError: what `Context.ask` raises.
        """
        for done, case in enumerate(cases):
            on_progress(done, len(cases))
            try:
                yield Measured(case, self._of(case, modes))
            except WindowExceededError as error:
                raise WindowExceededError(f"{error} It was question {case.number + 1}.") from error
        on_progress(len(cases), len(cases))

    def divergences(
        self, cases: Sequence[Case], modes: Sequence[str], on_progress: Callable[[int, int], None]
    ) -> dict[str, list[float]]:
        """KL divergence of some modes from full prefill, case by case, in nats: the mean over the tokens of full
        prefill's answer. No mode answers itself, so this is cheaper than `measure`. It is kept in the same way.

        Raises:
            BraidError: what `Context.ask` raises.
        """
        found: dict[str, list[float]] = {mode: [] for mode in modes}
        for done, case in enumerate(cases):
            on_progress(done, len(cases))
            keys = {mode: self._key(case, mode, "KL alone") for mode in modes}
            if missing := [mode for mode, key in keys.items() if not self._outcomes.find(key)]:
                with self._registered(case) as keep:
                    exact = self._compose(case.chunk_ids, mode=REFERENCE, keep=keep)
                    ids = exact.ask(case.question.question, max_new_tokens=self._most).token_ids
                    truth = exact.answer_logits(case.question.question, ids)
                    for mode in missing:
                        context = self._compose(case.chunk_ids, mode=mode, keep=keep)
                        kl, top1 = compared(truth, context.answer_logits(case.question.question, ids))
                        self._outcomes.keep(keys[mode], Outcome(mode, "", (), kl, top1, 0, 0.0, 0.0, len(ids)))
            for mode, key in keys.items():
                if outcome := self._outcomes.find(key):
                    found[mode].append(outcome.kl)
        on_progress(len(cases), len(cases))
        return found

    def _of(self, case: Case, modes: Sequence[str]) -> dict[str, Outcome]:
        keys = {mode: self._key(case, mode) for mode in (REFERENCE, *modes)}
        known = {mode: found for mode, key in keys.items() if (found := self._outcomes.find(key))}
        if len(known) < len(keys):
            with self._registered(case) as keep:
                if not self._is_warm:  # what the first call waits for, such as compiling, is no part of the figures
                    self._ask(case, [mode for mode in keys if mode not in known], known, keep, lambda *_: None)
                    self._is_warm = True
                self._ask(
                    case,
                    [mode for mode in keys if mode not in known],
                    known,
                    keep,
                    lambda mode, outcome: self._outcomes.keep(keys[mode], outcome),
                )
        return {mode: found for mode, key in keys.items() if (found := self._outcomes.find(key))}

    def _ask(
        self,
        case: Case,
        modes: Sequence[str],
        known: dict[str, Outcome],
        keep: bool | None,
        took: Callable[[str, Outcome], None],
    ) -> None:
        """Measure some modes of one question."""
        question = case.question.question
        exact = self._compose(case.chunk_ids, mode=REFERENCE, keep=keep)
        exact.prepare()
        answer: Answer | None = None
        ids = known[REFERENCE].token_ids if REFERENCE in known else ()
        if not ids:
            answer = exact.ask(question, max_new_tokens=self._most)
            ids = answer.token_ids
        truth = exact.answer_logits(question, ids)
        for mode in modes:
            if answer and mode == REFERENCE:
                kl, top1 = compared(truth, exact.answer_logits(question, ids))
                budget, first_token_ms = 1.0, self._full_prefill_ms(answer.prompt_ids)
                given = answer
            else:
                context = self._compose(case.chunk_ids, mode=mode, keep=keep)
                context.prepare()
                kl, top1 = compared(truth, context.answer_logits(question, ids))
                given = context.ask(question, max_new_tokens=self._most)
                budget, first_token_ms = budget_of(given, len(context.input_ids)), given.timings.first_token_ms
            prefix = common_start(given.token_ids, ids)
            took(mode, Outcome(mode, given.text, given.token_ids, kl, top1, prefix, budget, first_token_ms, len(ids)))

    def _full_prefill_ms(self, prompt_ids: tuple[int, ...]) -> float:
        """Time to the first token of a prompt of which nothing is cached."""
        engine = self._engine
        request = Request(
            priority=Priority.QUESTION,
            submitted=perf_counter(),
            namespace=engine.namespace,
            composition=Composition(REFERENCE, (), tail=prompt_ids),
            params=resolve({"max_new_tokens": 1}, engine.config, len(prompt_ids)),
            counted=False,
        )
        engine.run(request)
        if request.outcome is None:
            raise RuntimeError("a request that has finished must have an outcome")
        return request.outcome.timings.first_token_ms

    @contextmanager
    def _registered(self, case: Case) -> Iterator[bool | None]:
        """Register a question's own passages while it is measured. Yields whether entries are kept: not of these."""
        if not case.texts:
            yield None
            return
        namespace = self._engine.namespace
        known = self._engine.store.known_chunks(namespace, case.chunk_ids)
        new = {id_: text for text in case.texts if (id_ := chunk_id(namespace, LEVEL_CONTEXT, text)) not in known}
        try:
            self._register(list(new.values()), metadata=[{**PASSAGE, "process": os.getpid()}] * len(new))
            yield False
        finally:
            self._delete(lambda chunk: chunk.id in new)

    def _delete(self, chosen: Callable[[Chunk], bool]) -> None:
        """Delete passages that a measurement registered, but none that somebody has named or described since."""
        own = {*PASSAGE, "process"}
        marked = [each for each in self._chunks.list(metadata=PASSAGE) if each.name is None and {*each.metadata} == own]
        if gone := [chunk for chunk in marked if chosen(chunk)]:
            self._chunks.delete_many(gone)

    def _key(self, case: Case, mode: str, *more: str) -> str:
        engine = self._engine
        return key_of(
            asdict(engine.identity),
            str(engine.device),
            repr(engine.backends),
            mode,
            case.chunk_ids,
            engine.layout.question_ids(case.question.question),
            self._most,
            *more,
        )


@torch.inference_mode()
def compared(truth: Tensor, logits: Tensor) -> tuple[float, float]:
    """KL divergence of some next-token distributions from the true ones, in nats, and the share of them that have the
    same likeliest token: means over the tokens.

    Args:
        truth, logits: [tokens, vocab_size].
    """
    total = 0.0
    for true, own in zip(truth, logits, strict=True):  # in float64 they take twice the memory
        true, own = (each.double().log_softmax(-1) for each in (true, own))
        total += max(0.0, float((true.exp() * (true - own)).sum()))
    same = (truth.argmax(-1) == logits.argmax(-1)).double().mean()
    return total / len(truth), float(same)


def budget_of(answer: Answer, context_tokens: int) -> float:
    """What a call computed of the context, missing entries and repairs, as a share of computing all of it."""
    usage = answer.usage
    question = usage.prompt_tokens - context_tokens
    return (usage.computed_tokens - question) / context_tokens + usage.budget


def common_start(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with in common."""
    same = 0
    for one, two in zip(ids, other, strict=False):
        if one != two:
            break
        same += 1
    return same
