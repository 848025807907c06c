"""How close modes come to full prefill on a real model, and how often an answer's first source is the right one.

    python benchmarks/quality_real.py --model MODEL --questions FILE --name SQuAD --licence "CC BY-SA 4.0" --sample 40

MODEL is what `Braid` opens, FILE what `braid fidelity --questions` reads, and KL is measured as there: along full
prefill's own answer. It is faster than that command, because all modes of a question answer together, and nothing is
timed. Outcomes go to a `.jsonl` file beside the results, so an interrupted run goes on where it stopped. With
--sources, each question says under "gold" which of its passages holds the answer; questions that are answered right are
then asked again without the answer's first source, and without another passage.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ttft import cpu_name

from braidsdk import Answer, Braid, Chunk
from braidsdk.fidelity import scores
from braidsdk.fidelity.bootstrap import Floats, estimate, mean, share_recovered
from braidsdk.fidelity.measure import budget_of, compared
from braidsdk.fidelity.questions import Question, read_questions

SYSTEM = "You answer from the documents, in a few words."
FULL, BASE = "exact", "anchored"
MODES = (
    "anchored",
    "isolated",
    "linked(16)",
    "blended(0.2)",
    "random(0.1)+shift",
    "guided(0.05)",
    "guided(0.1)",
    "guided(0.1)+shift",
    "guided(0.15)",
    "guided(0.15)+shift",
    "guided(0.3)+shift",
)
SOURCES = ("anchored", "guided(0.15)+shift")
"""Modes in which sources are measured."""

RIVAL, CHALLENGER = "blended(0.2)", "guided(0.1)"

_braid: Braid


def open_model(model: str, dtype: str, folder: str, device: str) -> None:
    """Start a worker: one thread, a model and a store of its own."""
    global _braid
    torch.set_num_threads(1)
    _braid = Braid(model, store=tempfile.mkdtemp(dir=folder), device=device, dtype=dtype)


def ask(question: Question, system: str, modes: Sequence[str], gold: int | None, most: int) -> dict[str, Any]:
    """All of one question: outcomes by mode, and its sources if the passage that holds the answer is known."""
    rules = _braid.register_system(system)
    chunks = _braid.register_many(list(question.passages or ()), progress=False)
    exact = _braid.compose([rules, *chunks], mode=FULL, keep=False)
    contexts = {mode: _braid.compose([rules, *chunks], mode=mode, keep=False) for mode in modes}
    full = exact.ask(question.question, max_new_tokens=most)
    truth = exact.answer_logits(question.question, full.token_ids)
    for mode in contexts:
        contexts[mode].prepare()
    answers: dict[str, Answer] = dict(
        zip(
            contexts,
            _braid.ask_many(
                [(each, question.question) for each in contexts.values()],
                sources=gold is not None,
                max_new_tokens=most,
            ),
            strict=True,
        )
    )
    outcomes = {FULL: {"kl": 0.0, "top1": 1.0, "budget": 1.0, "text": full.text, **judged(full, question)}}
    for mode, context in contexts.items():
        kl, top1 = compared(truth, context.answer_logits(question.question, full.token_ids))
        spent = {"kl": kl, "top1": top1, "budget": budget_of(answers[mode], len(context.input_ids))}
        outcomes[mode] = {**spent, "text": answers[mode].text, **judged(answers[mode], question)}
    found = {}
    for mode in set(SOURCES) & set(modes):
        if gold is not None and outcomes[mode]["contains"]:
            found[mode] = without_source(answers[mode], mode, question, [rules, *chunks], chunks[gold], most)
    _braid.chunks.delete_many([each.id for each in chunks])
    return {"modes": outcomes, "sources": found}


def judged(answer: Answer, question: Question) -> dict[str, float]:
    if not question.answers:
        return {}
    return {
        "contains": scores.contains(answer.text, question.answers),
        "f1": scores.f1(answer.text, question.answers),
    }


def without_source(
    answer: Answer, mode: str, question: Question, chunks: Sequence[Chunk], gold: Chunk, most: int
) -> dict[str, Any]:
    """The rank of the passage that holds the answer, and whether the right answer is lost without the first source, and
    without another passage."""
    ranked = [source.chunk for source in answer.sources or ()]
    first, other = ranked[0], random.Random(question.question).choice(ranked[1:])
    contexts = [
        _braid.compose([each for each in chunks if each.id != left_out.id], mode=mode, keep=False)
        for left_out in (first, other)
    ]
    again = _braid.ask_many([(each, question.question) for each in contexts], max_new_tokens=most)
    lost = [not scores.contains(each.text, question.answers) for each in again]
    rank = [each.id for each in ranked].index(gold.id) + 1
    return {"rank": rank, "lost_without_first": lost[0], "lost_without_another": lost[1]}


def read_gold(path: Path, questions: Sequence[Question]) -> list[int]:
    """Which of its passages holds each question's answer."""
    content = json.loads(path.read_text())
    return [given["passages"].index(given["gold"]) for given in content["questions"][: len(questions)]]


def summed_up(measured: Sequence[dict[str, Any]], names: Sequence[str], seed: int) -> dict[str, Any]:
    """Figures by mode, each with its 95 % interval."""

    def of(mode: str, name: str) -> list[float]:
        return [each["modes"][mode][name] for each in measured]

    modes: dict[str, dict[str, Any]] = {}
    for mode in names:
        figures = {
            name: estimate(mean, of(mode, name), seed=seed) for name in measured[0]["modes"][mode] if name != "text"
        }
        if mode not in (FULL, BASE):
            figures["recovered"] = estimate(share_recovered, of(mode, "kl"), of(BASE, "kl"), seed=seed)
            worse = [float(own > base) for own, base in zip(of(mode, "kl"), of(BASE, "kl"), strict=True)]
            figures["worse"] = estimate(mean, worse, seed=seed)
        if any(of(FULL, "contains")):
            figures["contains_of_full"] = estimate(ratio, of(mode, "contains"), of(FULL, "contains"), seed=seed)
        modes[mode] = {name: asdict(value) for name, value in figures.items()}
    report: dict[str, Any] = {"questions": len(measured), "modes": modes}
    if {RIVAL, CHALLENGER} <= set(names):
        points = estimate(recovered_more, *(of(mode, "kl") for mode in (CHALLENGER, RIVAL, BASE)), seed=seed)
        report["recovered_more"] = {"mode": CHALLENGER, "than": RIVAL, **asdict(points)}
    sources = {mode: [each["sources"][mode] for each in measured if mode in each["sources"]] for mode in SOURCES}
    report["sources"] = {
        mode: {
            "right_answers": len(found),
            "gold_first": sum(each["rank"] == 1 for each in found) / len(found),
            "lost_without_first": sum(each["lost_without_first"] for each in found) / len(found),
            "lost_without_another": sum(each["lost_without_another"] for each in found) / len(found),
        }
        for mode, found in sources.items()
        if found
    }
    return report


def ratio(values: Floats, other: Floats) -> Any:
    total = other.mean(-1)
    return values.mean(-1) / np.where(total == 0, np.nan, total)


def recovered_more(values: Floats, other: Floats, base: Floats) -> Any:
    """By how much the first mode wins back a greater share than the second."""
    return (other.mean(-1) - values.mean(-1)) / base.mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-name", help="what the results call it; the same if left out")
    parser.add_argument("--questions", required=True, type=Path)
    parser.add_argument("--name", required=True, help="what the results call the questions")
    parser.add_argument("--licence", help="of the questions")
    parser.add_argument("--modes", nargs="+", default=MODES, help="anchored must be among them")
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument(
        "--skip", type=int, default=0, help="questions drawn before these, such as those a rule is from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", default=SYSTEM)
    parser.add_argument("--sources", action="store_true", help="measure sources, too")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--no-new", action="store_true", help="sum up what is kept, and ask nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality-real.json")
    options = parser.parse_args()
    questions = read_questions(options.questions)
    gold = read_gold(options.questions, questions) if options.sources else None
    order = list(range(len(questions)))
    random.Random(options.seed).shuffle(order)
    places = order[options.skip : options.skip + options.sample]

    kept_in = options.out.with_name(f"{options.out.stem}-{options.name}-{options.dtype}.jsonl")
    kept = dict(json.loads(line) for line in kept_in.read_text().splitlines()) if kept_in.exists() else {}
    missing = [] if options.no_new else [place for place in places if place not in kept]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            options.workers, get_context("spawn"), open_model, (options.model, options.dtype, folder, options.device)
        ) as pool,
        kept_in.open("a") as file,
    ):
        running = {
            pool.submit(
                ask,
                questions[place],
                options.system,
                options.modes,
                gold[place] if gold else None,
                options.max_new_tokens,
            ): place
            for place in missing
        }
        for future in as_completed(running):
            kept[running[future]] = future.result()
            file.write(json.dumps([running[future], future.result()]) + "\n")
            file.flush()
            sys.stderr.write(f"{len(kept)} of {len(places)}\n")
    measured = [kept[place] for place in places if place in kept]
    report = json.loads(options.out.read_text()) if options.out.exists() else {"benchmark": "quality_real"}
    report.setdefault("sets", {})[options.name] = {
        "licence": options.licence,
        "model": options.model_name or options.model,
        "dtype": options.dtype,
        "system": options.system,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "skipped": options.skip,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **summed_up(measured, [FULL, *options.modes], options.seed),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
