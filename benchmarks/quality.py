"""What composing costs in answers, by mode: braid-tiny on names that it has never seen, on a CPU.

    python benchmarks/quality.py                      # 100 questions a cell; an hour on two cores
    python benchmarks/quality.py --questions 500 --documents 6 --kinds alias

A cell is a number of documents and a kind of question: direct (a fact), alias (by a name that another document
explains), chain (over two documents). In each, the same questions are asked in every mode, through public calls. An
answer is right if it is the one of the sample, character for character. `budget` is the repaired work, choosing
included, as a share of computing all documents. What a repair wins back is a share of what `anchored` loses to `exact`;
its interval is a paired bootstrap's over questions, 95 %.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from ttft import cpu_name

from braidsdk import Braid
from braidsdk.models.tiny.evaluate import Asked, held_out_sample

MODES = (
    "exact",
    "anchored",
    "isolated",
    "linked(16)",
    "blended(0.2)",
    "guided(0.05)",
    "guided(0.1)",
    "guided(0.15)",
    "guided(0.15)+shift",
    "guided(0.2)",
    "guided(0.3)",
    "guided(0.6)",
)
DOCUMENTS, KINDS = (2, 6, 10, 30), ("direct", "alias", "chain")
LEAST_LOSS = 0.03
"""Where `anchored` loses less than this share of answers, there is too little to win back to say how much."""
RESAMPLES = 2000


def ask(braid: Braid, kind: Asked, documents: int, questions: int, modes: Sequence[str]) -> dict[str, object]:
    """One cell."""
    marks: dict[str, list[bool]] = {mode: [] for mode in modes}
    budgets: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(questions):
        sample = held_out_sample(documents, kind, number)
        (question,) = sample.questions
        rules = braid.register_system(sample.system or "")
        chunks = [rules, *braid.register_many(sample.documents, progress=False)]
        for mode in modes:
            answer = braid.compose(chunks, mode=mode, keep=False).ask(question.text, max_new_tokens=32)
            marks[mode].append(answer.text == question.answer)
            budgets[mode].append(answer.usage.budget)
        braid.chunks.delete_many([chunk.id for chunk in chunks[1:]])
    return {
        "kind": kind,
        "documents": documents,
        "questions": questions,
        "modes": {
            mode: {
                "right": sum(marks[mode]) / questions,
                "budget": sum(budgets[mode]) / questions,
                "worse": sum(a and not b for a, b in zip(marks["anchored"], marks[mode], strict=True)) / questions,
                **won_back(marks, mode),
            }
            for mode in modes
        },
    }


def won_back(marks: dict[str, list[bool]], mode: str) -> dict[str, object]:
    """The share of `anchored`'s loss that a mode wins back, with its interval; nothing where it loses too little."""
    whole, none, some = (list(map(int, marks[each])) for each in ("exact", "anchored", mode))
    count, rng, shares = len(whole), random.Random(0), []
    if (sum(whole) - sum(none)) / count < LEAST_LOSS or mode in ("exact", "anchored", "isolated"):
        return {}
    for _ in range(RESAMPLES):
        places = rng.choices(range(count), k=count)
        loss = sum(whole[at] - none[at] for at in places)
        if loss > 0:
            shares.append(sum(some[at] - none[at] for at in places) / loss)
    shares.sort()
    share = (sum(some) - sum(none)) / (sum(whole) - sum(none))
    return {"won_back": share, "from": shares[len(shares) // 40], "to": shares[-1 - len(shares) // 40]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, help="in each cell")
    parser.add_argument("--documents", type=int, nargs="+", default=DOCUMENTS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--modes", nargs="+", default=MODES, help="exact and anchored must be among them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    options = parser.parse_args()
    cells = []
    for documents in options.documents:
        for kind in options.kinds:
            with (
                tempfile.TemporaryDirectory() as store,
                Braid("braid-tiny", store=store, device="cpu", dtype="float32") as braid,
            ):
                cells.append(ask(braid, kind, documents, options.questions, options.modes))
            sys.stderr.write(f"{json.dumps(cells[-1])}\n")
            report = {
                "benchmark": "quality",
                "command": " ".join(["python benchmarks/quality.py", *sys.argv[1:]]),
                "model": "braid-tiny, float32",
                "cpu": cpu_name(),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "cells": cells,
            }
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
