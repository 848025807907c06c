"""Checks what a measurement is asked for, measures, and keeps its certificates."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from braidsdk.chunks import Chunks
from braidsdk.compose.auto import Auto
from braidsdk.compose.modes import parse_mode
from braidsdk.compose.repairs import Repair
from braidsdk.engine.engine import Engine
from braidsdk.engine.sampling import resolve
from braidsdk.errors import InputError, StoreError, shown
from braidsdk.fidelity.calibrate import QUESTIONS, calibration
from braidsdk.fidelity.measure import REFERENCE, Bench, Compose, Register, drawn, find_cases, held_out
from braidsdk.fidelity.questions import Question, parse_questions, references_of
from braidsdk.fidelity.report import FidelityReport, Setting, make_report
from braidsdk.fidelity.scores import NOT_FOUND
from braidsdk.types import Chunk, Mode

BASELINE: Mode = "anchored"
"""The mode that others are compared with."""

MOST_SEED = 2**32

_log = logging.getLogger(__name__)


def run(
    engine: Engine,
    chunks: Chunks,
    *,
    compose: Compose,
    register: Register,
    selected: Sequence[Chunk],
    questions: Sequence[object],
    modes: Sequence[str | Repair] | None,
    references: Sequence[str | Sequence[str] | None] | None,
    sample: int | None,
    seed: int,
    max_new_tokens: int,
    not_found: Sequence[str] | None,
    calibrate: bool,
    on_progress: Callable[[int, int], None],
) -> FidelityReport:
    """See `Braid.fidelity`, which this is."""
    asked = _with_references(parse_questions(questions), references)
    if type(seed) is not int or not 0 <= seed < MOST_SEED:
        raise InputError(f"seed must be a whole number from 0 to {MOST_SEED - 1}; got {shown(seed)}.")
    resolve({"max_new_tokens": max_new_tokens}, engine.config, 0)
    phrases = NOT_FOUND if not_found is None else not_found
    if not isinstance(phrases, list | tuple) or not all(isinstance(each, str) and each.strip() for each in phrases):
        raise InputError(f"not_found must be a list of phrases; got {shown(not_found)}.")
    if modes is not None and (not isinstance(modes, list | tuple) or not modes):
        raise InputError(f"modes must be a list with at least one mode; got {shown(modes)}.")
    if type(calibrate) is not bool:
        raise InputError(f"calibrate must be True or False; got {shown(calibrate)}.")
    for each in modes or ():  # a bad one is refused before anything is measured
        if isinstance(parse_mode(each), Auto):
            raise InputError("modes must be those that auto may choose; got auto itself. Name them.")
        compose([], mode=each)
    cases = find_cases(engine, chunks, selected, asked, drawn(asked, sample, seed))
    bench = Bench(engine, chunks, compose=compose, register=register, max_new_tokens=max_new_tokens)
    before = 0
    if calibrate:
        own = find_cases(engine, chunks, selected, asked, held_out(asked, QUESTIONS, seed))
        before = 2 * len(own)
        found = calibration(bench, own, engine.config.layers, lambda done, total: on_progress(done, total + len(cases)))
        engine.certificates.keep_calibration(found)
    names = {str(each): compose([], mode=each).mode for each in modes or [BASELINE]}
    identity = engine.identity
    key = f"model:{identity.weights}"
    setting = Setting(
        model=engine.store.recall([key]).get(key, identity.weights[:12]),
        weights=identity.weights,
        tokenizer=identity.tokenizer,
        dtype=identity.dtype,
        device=str(engine.device),
        namespace=engine.namespace,
        given=len(asked),
        seed=seed,
        baseline=BASELINE if BASELINE in names.values() else None,
        not_found=tuple(phrases),
        names=names,
    )
    own_modes = [mode for mode in dict.fromkeys(names.values()) if mode != REFERENCE]
    measured = bench.measure(cases, own_modes, lambda done, total: on_progress(before + done, before + total))
    report = make_report(setting, list(measured))
    try:
        engine.certificates.keep(report.certificates())
    except StoreError as error:
        _log.warning("the certificates were not stored: %s", error)
    return report


def _with_references(
    questions: list[Question], references: Sequence[str | Sequence[str] | None] | None
) -> list[Question]:
    if references is None:
        return questions
    if not isinstance(references, list | tuple) or len(references) != len(questions):
        listed = isinstance(references, list | tuple)
        got = str(len(references)) if listed else f"a {type(references).__name__}"
        raise InputError(
            f"references must have one item per question: expected {len(questions)}, got {got}. Put None for no item."
        )
    return [
        replace(question, answers=references_of(each, f"references[{place}]"))
        for place, (question, each) in enumerate(zip(questions, references, strict=True))
    ]
