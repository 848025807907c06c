"""Checks what a measurement is asked for, measures, and keeps its certificates."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from braidsdk.chunks import Chunks
from braidsdk.engine.engine import Engine
from braidsdk.engine.sampling import resolve
from braidsdk.errors import InputError, shown
from braidsdk.fidelity.measure import REFERENCE, Bench, Compose, drawn, find_cases
from braidsdk.fidelity.questions import Question, parse_questions, references_of
from braidsdk.fidelity.report import FidelityReport, Setting, make_report
from braidsdk.fidelity.scores import NOT_FOUND
from braidsdk.types import Chunk

MOST_SEED = 2**32


def run(
    engine: Engine,
    chunks: Chunks,
    *,
    compose: Compose,
    register: Callable[[Sequence[str]], object],
    selected: Sequence[Chunk],
    questions: Sequence[object],
    modes: Sequence[str | None] | None,
    references: Sequence[str | Sequence[str] | None] | None,
    sample: int | None,
    seed: int,
    max_new_tokens: int,
    not_found: Sequence[str] | None,
    on_progress: Callable[[int, int], None],
) -> FidelityReport:
    """See `Braid.fidelity`, which this is."""
    asked = _with_references(parse_questions(questions), references)
    if type(seed) is not int or not 0 <= seed < MOST_SEED:
        raise InputError(f"seed must be a whole number from 0 to {MOST_SEED - 1}; got {shown(seed)}.")
    resolve({"max_new_tokens": max_new_tokens}, engine.config, 0)
    phrases = tuple(NOT_FOUND if not_found is None else not_found)
    if isinstance(not_found, str) or not all(isinstance(each, str) and each.strip() for each in phrases):
        raise InputError(f"not_found must be a list of phrases; got {shown(not_found)}.")
    if isinstance(modes, str) or (modes is not None and not modes):
        raise InputError(f"modes must be a list with at least one mode; got {shown(modes)}.")
    names = dict.fromkeys(compose([], mode=each).mode for each in modes or [None])
    names.pop(REFERENCE, None)
    baseline = compose([], mode=None).mode
    cases = find_cases(engine, chunks, selected, asked, drawn(asked, sample, seed))
    bench = Bench(engine, chunks, compose=compose, register=register, modes=list(names), max_new_tokens=max_new_tokens)
    identity = engine.identity
    named = f"model:{identity.weights}"
    setting = Setting(
        model=engine.store.recall([named]).get(named, identity.weights[:12]),
        weights=identity.weights,
        tokenizer=identity.tokenizer,
        dtype=identity.dtype,
        device=str(engine.device),
        namespace=engine.namespace,
        given=len(asked),
        seed=seed,
        baseline=baseline if baseline in names else None,
        not_found=phrases,
    )
    report = make_report(setting, list(bench.measure(cases, on_progress)))
    engine.certificates.keep(report.certificates())
    return report


def _with_references(
    questions: list[Question], references: Sequence[str | Sequence[str] | None] | None
) -> list[Question]:
    if references is None:
        return questions
    if isinstance(references, str) or len(references) != len(questions):
        got = "a single text" if isinstance(references, str) else str(len(references))
        raise InputError(
            f"references must have one item per question: expected {len(questions)}, got {got}. Put None for no item."
        )
    return [
        replace(question, answers=references_of(each, f"references[{place}]"))
        for place, (question, each) in enumerate(zip(questions, references, strict=True))
    ]
