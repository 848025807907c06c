"""What composing costs in answers, by mode: braid-tiny on names that it has never seen, on a CPU.

    python benchmarks/quality.py                      # as many questions as fit into 45 minutes, 500 at most
    python benchmarks/quality.py --questions 500 --documents 6 --kinds alias

A cell is a number of documents and a kind of question: direct (a fact), alias (by a name that another document
explains), chain (over two documents). In each, the same questions are asked in every mode, through public calls. An
answer is right if it is the one of the sample, character for character. `budget` is the repaired work, choosing
included, as a share of computing all documents. What a repair wins back is a share of what `anchored` loses to `exact`;
its interval is a paired bootstrap's over questions, 95 %. So is that of how much more a mode has right than `isolated`.
`worse` is the share of questions that `anchored` answers right and the mode does not. Direct questions also say whether
the document that holds the fact is the first of an answer's sources.

Questions go in rounds through all cells, so whenever time ends all cells have the same number. Before them `guided` is
calibrated, by 30 other questions.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from ttft import cpu_name

from braidsdk import Answer, Braid
from braidsdk.fidelity.bootstrap import Floats, estimate, mean_difference
from braidsdk.fidelity.calibrate import QUESTIONS
from braidsdk.models.tiny.evaluate import Asked, held_out_sample

MODES = (
    "exact",
    "anchored",
    "isolated",
    "linked(16)",
    "blended(0.2)",
    "guided(0.2)",
    "guided(0.2)+shift",
    "random(0.2)",
)
RATIOS = (0.05, 0.1, 0.15, 0.3, 0.6)
CURVES = ("guided({})", "guided({})+shift", "blended({})", "random({})")
CURVE_DOCUMENTS = 6
"""Cells of so many documents also ask at all ratios."""

DOCUMENTS, KINDS = (2, 6, 10, 30), ("direct", "alias", "chain")
ROUND = 10
"""Questions of a cell that are asked together."""

CALIBRATION = 100_000
"""The first question by which `guided` is calibrated; questions that are asked have lower numbers."""

LEAST_LOSS = 0.03
"""Where `anchored` loses less than this share of answers, there is too little to win back to say how much."""

Outcomes = list[dict[str, Any]]
"""Of each question: by mode whether the answer is right, and the budget; under "source", where the document with the
fact stands, from 0 to 1, and whether it is the first source."""

_braid: Braid


def open_model(dtype: str, folder: str, device: str) -> None:
    """Start a worker: one thread, a model and a store of its own."""
    global _braid
    torch.set_num_threads(1)
    _braid = Braid("braid-tiny", store=tempfile.mkdtemp(dir=folder), device=device, dtype=dtype)


def modes_of(documents: int, modes: Sequence[str]) -> list[str]:
    curves = [curve.format(ratio) for curve in CURVES for ratio in RATIOS] if documents == CURVE_DOCUMENTS else []
    return [*modes, *(mode for mode in curves if mode not in modes)]


def calibrated(modes: Sequence[str], dtype: str, device: str, store: str) -> dict[str, str]:
    """Modes as they are once `guided` is calibrated, by questions of all kinds that are not asked otherwise."""
    samples = [
        held_out_sample(CURVE_DOCUMENTS, kind, CALIBRATION + number)
        for number in range(QUESTIONS // len(KINDS) + 1)
        for kind in KINDS
    ]
    questions = [
        {"question": each.questions[0].text, "passages": [text for text in each.documents if text.strip()]}
        for each in samples
    ]
    with Braid("braid-tiny", store=store, device=device, dtype=dtype) as braid:
        rules = braid.register_system(samples[0].system or "")
        braid.fidelity([rules], questions, ["anchored"], sample=1, max_new_tokens=32, calibrate=True)
        return {mode: braid.compose([], mode=mode).mode for mode in modes}


def ask(documents: int, kind: Asked, first: int, count: int, modes: Mapping[str, str]) -> Outcomes:
    """Some questions of a cell, in all its modes."""
    samples = [held_out_sample(documents, kind, number) for number in range(first, first + count)]
    asked, registered = [], []
    for sample in samples:
        rules = _braid.register_system(sample.system or "")
        chunks = _braid.register_many([text for text in sample.documents if text.strip()], progress=False)
        registered.append(chunks)
        asked.append(([rules, *chunks], sample.questions[0]))
    answers: dict[str, list[Answer]] = {}
    for mode, text in modes.items():
        pairs = [(_braid.compose(chunks, mode=text, keep=False), question.text) for chunks, question in asked]
        sources = kind == "direct" and mode == "anchored"
        answers[mode] = _braid.ask_many(pairs, max_new_tokens=32, sources=sources)
    outcomes: Outcomes = []
    for at, ((_, question), sample) in enumerate(zip(asked, samples, strict=True)):
        given = {mode: answers[mode][at] for mode in modes}
        right = {mode: answer.text == question.answer for mode, answer in given.items()}
        outcome: dict[str, Any] = {"right": right, "budget": {mode: each.usage.budget for mode, each in given.items()}}
        if kind == "direct" and right["anchored"] and question.document is not None:
            sources = given["anchored"].sources or ()
            gold = sample.documents[question.document].strip()
            outcome["source"] = {
                "place": question.document / max(1, documents - 1),
                "first": sources[0].chunk.text == gold,
            }
        outcomes.append(outcome)
    _braid.chunks.delete_many({chunk.id for chunks in registered for chunk in chunks})
    return outcomes


def summed_up(documents: int, kind: str, outcomes: Outcomes) -> dict[str, Any]:
    """One cell."""
    count = len(outcomes)
    marks = {mode: [float(each["right"][mode]) for each in outcomes] for mode in outcomes[0]["right"]}
    cell: dict[str, Any] = {"kind": kind, "documents": documents, "questions": count, "modes": {}}
    for mode, right in marks.items():
        cell["modes"][mode] = {
            "right": sum(right) / count,
            "budget": sum(each["budget"][mode] for each in outcomes) / count,
            "worse": sum(a > b for a, b in zip(marks["anchored"], right, strict=True)) / count,
        }
        lost = (sum(marks["exact"]) - sum(marks["anchored"])) / count
        if lost >= LEAST_LOSS and mode not in ("exact", "anchored", "isolated"):
            won = estimate(won_back, right, marks["anchored"], marks["exact"], seed=0)
            cell["modes"][mode]["won_back"] = asdict(won)
        if "isolated" in marks and mode != "isolated":
            more = estimate(mean_difference, right, marks["isolated"], seed=0)
            cell["modes"][mode]["over_isolated"] = asdict(more)
    return cell


def won_back(some: Floats, none: Floats, whole: Floats) -> Any:
    """The share of `anchored`'s loss that a mode wins back."""
    lost = (whole - none).sum(-1)
    return (some - none).sum(-1) / lost if lost.ndim == 0 else (some - none).sum(-1)[lost > 0] / lost[lost > 0]


def sources_of(outcomes: Outcomes) -> dict[str, Any]:
    """How often the document that holds the fact is the first source of a right answer, by the third it stands in."""
    found = [each["source"] for each in outcomes if "source" in each]
    thirds = [[each["first"] for each in found if min(2, int(3 * each["place"])) == third] for third in range(3)]
    return {
        "right_answers": len(found),
        "first": sum(each["first"] for each in found) / len(found),
        "by_third": [{"right_answers": len(third), "first": sum(third) / max(1, len(third))} for third in thirds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500, help="in each cell, at most")
    parser.add_argument("--minutes", type=float, default=45, help="start no round later")
    parser.add_argument("--documents", type=int, nargs="+", default=DOCUMENTS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--modes", nargs="+", default=MODES, help="exact and anchored must be among them")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    options = parser.parse_args()
    cells = [(documents, kind) for documents in sorted(options.documents, reverse=True) for kind in options.kinds]
    outcomes: dict[tuple[int, str], Outcomes] = {cell: [] for cell in cells}
    named = {documents: modes_of(documents, options.modes) for documents in options.documents}
    end = monotonic() + 60 * options.minutes
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            options.workers, get_context("spawn"), open_model, (options.dtype, folder, options.device)
        ) as pool,
    ):
        every = sorted({mode for modes in named.values() for mode in modes})
        texts = calibrated(every, options.dtype, options.device, f"{folder}/calibration")
        for first in range(0, options.questions, ROUND):
            if monotonic() > end:
                break
            count = min(ROUND, options.questions - first)
            running = {
                (documents, kind): pool.submit(
                    ask, documents, kind, first, count, {mode: texts[mode] for mode in named[documents]}
                )
                for documents, kind in cells
            }
            for cell, future in running.items():
                outcomes[cell] += future.result()
            sys.stderr.write(f"{first + count} questions a cell\n")
            report = {
                "benchmark": "quality",
                "model": "braid-tiny",
                "dtype": options.dtype,
                "asked_for": options.questions,
                "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
                "calibrated": texts.get("guided(0.2)"),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "cells": [summed_up(*cell, outcomes[cell]) for cell in sorted(cells, key=lambda cell: cell[0])],
                "sources": sources_of([each for cell in cells for each in outcomes[cell]]),
            }
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
