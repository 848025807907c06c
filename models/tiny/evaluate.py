"""Measure a checkpoint on names that it has never seen: `python -m braidsdk.models.tiny.evaluate FOLDER`.

An answer counts only if each of its tokens, including the end token, is the model's first choice. One pass over prompt
and answer decides that: greedy decoding gives the answer if and only if each token is the first choice after those
before it.

Attention masks emulate composition, and positions stay absolute. In `isolated` a document sees only itself. In
`anchored` it also sees the system block, if there is one. The question sees everything except other questions.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from braidsdk.models.tiny.layout import Layout, Prefix
from braidsdk.models.tiny.phrases import SYSTEM_PROMPTS
from braidsdk.models.tiny.world import Kind, Sample, make_sample

__all__ = ["Asked", "Case", "Mode", "evaluate", "held_out_sample", "load", "score", "table"]

log = logging.getLogger(__name__)

Mode = Literal["exact", "anchored", "isolated"]
MODES: tuple[Mode, ...] = get_args(Mode)

Asked = Literal["direct", "bare", "clause", "alias", "chain", "mixed", "unknown"]
"""What a cell asks: a kind of question, or a mix of kinds. `bare` means direct questions without a system prompt, and
`clause` means direct questions about facts that all go on after their value."""

DOCUMENTS: dict[Asked, tuple[int, ...]] = {
    "direct": (1, 2, 4, 6, 10, 16, 30, 60),
    "bare": (1, 2, 6),
    "clause": (1, 6, 16),
    "alias": (1, 2, 4, 6, 10, 16, 30, 60),
    "chain": (2, 4, 6, 10, 60),
    "mixed": (2, 4, 6, 10),
    "unknown": (2, 6, 10, 60),
}
"""Numbers of documents in the cells."""

MIXED: dict[Kind, float] = {"direct": 0.4, "alias": 0.3, "chain": 0.15, "unknown": 0.15}
TOGETHER = ((6, 2), (16, 5), (60, 10))
"""(most documents, questions that share one set of documents). Many documents are read once for several questions."""

FACTS = {60: (1, 5)}
"""Fewest and most facts of a document, by the number of documents; (1, 8) for other numbers. So 60 documents have 4,096
tokens on average."""

BATCH_TOKENS = 8192
"""About how many tokens of documents are read at once."""


@dataclass(frozen=True)
class Case:
    """Documents and the (question, answer) ids to try on them. Every question is a separate prompt.

    `anchor` is the length of the system block, and 0 without one: then `anchored` is the same as `isolated`.
    """

    prefix: Prefix
    turns: list[tuple[list[int], list[int]]]
    anchor: int

    @classmethod
    def build(
        cls, layout: Layout, system: str | None, documents: Sequence[str], questions: Sequence[tuple[str, str]]
    ) -> "Case":
        """Make a case from texts. Each answer ends with its full stop."""
        texts, answers = [question for question, _ in questions], [answer for _, answer in questions]
        prefix = layout.prefix(system, documents)
        return cls(prefix, layout.turns(texts, answers), 0 if system is None else prefix.bounds[0])


def load(folder: Path, device: torch.device) -> tuple[Qwen3ForCausalLM, Layout]:
    """The checkpoint as shipped (bfloat16 weights, computed in float32) and its layout."""
    model = Qwen3ForCausalLM.from_pretrained(folder)
    model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    return model, Layout(Tokenizer.from_file(str(folder / "tokenizer.json")))


def _visible(parts: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boolean mask `[rows, 1, length, length]`: which keys (last) each query sees.

    `parts` `[rows, length]` numbers the parts that see themselves. Parts before the questions have numbers from 0 up.
    Questions have numbers below 0, and also see everything before the questions. `anchors` `[rows]` is the number of
    first tokens that every part sees.
    """
    length = parts.shape[1]
    keys, queries = parts[:, None, :], parts[:, :, None]
    anchored = torch.arange(length, device=parts.device) < anchors[:, None]
    seen = (keys == queries) | ((queries < 0) & (keys >= 0)) | anchored[:, None, :]
    return seen.tril()[:, None]


def _row(case: Case, mode: Mode) -> tuple[list[int], list[int], list[int]]:
    """(ids, positions, parts) of the case's row; each question goes on from the end of the documents."""
    ids, ends = list(case.prefix.ids), case.prefix.bounds
    positions, parts = list(range(len(ids))), [0] * len(ids)
    if mode != "exact":
        parts = [piece for piece, (start, end) in enumerate(pairwise((0, *ends))) for _ in range(start, end)]
    for number, (question, answer) in enumerate(case.turns, start=1):
        length = len(question) + len(answer)
        ids += question + answer
        positions += range(ends[-1], ends[-1] + length)
        parts += [-number] * length
    return ids, positions, parts


def _score_batch(model: Qwen3ForCausalLM, cases: Sequence[Case], mode: Mode) -> list[list[bool]]:
    rows = [_row(case, mode) for case in cases]
    longest = max(len(ids) for ids, _, _ in rows)
    padding = (0, 0, -1 - max(len(case.turns) for case in cases))
    ids, positions, parts = (
        torch.tensor([row[i] + [padding[i]] * (longest - len(row[i])) for row in rows], device=model.device)
        for i in range(3)
    )
    anchors = torch.tensor([case.anchor if mode == "anchored" else 0 for case in cases], device=model.device)
    mask = {"full_attention": _visible(parts, anchors)}
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    marks = []
    for case, chosen in zip(cases, logits.argmax(-1).tolist(), strict=True):
        end, right = len(case.prefix.ids), []
        for question, answer in case.turns:
            end += len(question) + len(answer)
            right.append(chosen[end - 1 - len(answer) : end - 1] == answer)
        marks.append(right)
    return marks


@torch.no_grad()
def score(model: Qwen3ForCausalLM, cases: Iterable[Case], mode: Mode) -> list[bool]:
    """Whether the model gives each question's answer, in order; the documents are computed once for a case."""
    cases = list(cases)
    by_length = sorted(range(len(cases)), key=lambda index: len(cases[index].prefix.ids))
    marks: dict[int, list[bool]] = {}
    while by_length:
        count = max(1, BATCH_TOKENS // len(cases[by_length[-1]].prefix.ids))
        by_length, batch = by_length[:-count], by_length[-count:]
        marks |= zip(batch, _score_batch(model, [cases[index] for index in batch], mode), strict=True)
    return [right for index in range(len(cases)) for right in marks[index]]


def held_out_sample(documents: int, asked: Asked, number: int, *, questions: int = 1) -> Sample:
    """Sample `number` of a cell: `questions` questions over `documents` documents, names of the test split."""
    rng = random.Random(f"cell/{documents}/{asked}/{number}")
    kinds: list[Kind]
    if asked == "mixed":
        kinds = rng.choices([*MIXED], [*MIXED.values()], k=questions)
    else:
        kinds = ["direct" if asked == "bare" or asked == "clause" else asked] * questions
    return make_sample(
        rng,
        "test",
        documents=documents,
        facts=[FACTS.get(documents, (1, 8))],
        kinds=kinds,
        clauses=1.0 if asked == "clause" else 0.12,
        system=None if asked == "bare" else SYSTEM_PROMPTS[0],
    )


def _cell(folder: Path, asked: Asked, documents: int, questions: int) -> list[Case]:
    layout = Layout(Tokenizer.from_file(str(folder / "tokenizer.json")))
    each = next(count for most, count in TOGETHER if documents <= most)
    samples = [held_out_sample(documents, asked, number, questions=each) for number in range(questions // each)]
    return [
        Case.build(layout, sample.system, sample.documents, [(asked.text, asked.answer) for asked in sample.questions])
        for sample in samples
    ]


def _evaluate_cell(
    folder: Path, device: torch.device, asked: Asked, documents: int, questions: int
) -> dict[str, object]:
    if device.type == "cpu":
        torch.set_num_threads(1)
    cases = _cell(folder, asked, documents, questions)
    model, _ = load(folder, device)
    marks = {mode: score(model, cases, mode) for mode in MODES}
    asked_for = [len(case.prefix.ids) + len(question) for case in cases for question, _ in case.turns]
    cell: dict[str, object] = {
        "kind": asked,
        "documents": documents,
        "questions": len(asked_for),
        "prompt_tokens": round(sum(asked_for) / len(asked_for)),
        "longest_prompt": max(asked_for),
        **{mode: sum(right) / len(right) for mode, right in marks.items()},
    }
    log.info("%s", cell)
    return cell


def evaluate(
    folder: Path, device: torch.device, *, questions: int = 500, most: int = 60, workers: int = 2
) -> dict[str, object]:
    """Accuracy of every cell of at most `most` documents, as `evaluation.json` holds it."""
    wanted = [(asked, count) for asked, counts in DOCUMENTS.items() for count in counts if count <= most]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_show_progress) as pool:
        longest_first = sorted(wanted, key=lambda cell: -cell[1])
        running = {cell: pool.submit(_evaluate_cell, folder, device, *cell, questions) for cell in longest_first}
        cells = [running[cell].result() for cell in wanted]
    return {"split": "test", "questions_per_cell": questions, "computed_in": "float32", "cells": cells}


def _show_progress() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def table(evaluation: dict[str, object]) -> str:
    """The model card's table, from the content of `evaluation.json`."""
    cells = evaluation["cells"]
    if not isinstance(cells, list):
        raise ValueError(
            f"'cells' must be a list; got a {type(cells).__name__}. Pass the content of an evaluation.json."
        )
    lines = [
        "| question | documents | prompt tokens | exact | anchored | isolated |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        marks = " | ".join(f"{cell[mode]:.3f}" for mode in MODES)
        lines.append(f"| {cell['kind']} | {cell['documents']} | {cell['prompt_tokens']} | {marks} |")
    return "\n".join(lines)


def main() -> None:
    """Write `evaluation.json` into the checkpoint's folder and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--questions", type=int, default=500, help="questions in each cell")
    parser.add_argument("--most", type=int, default=60, help="leave out cells of more documents")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = evaluate(
        arguments.folder,
        torch.device(arguments.device),
        questions=arguments.questions,
        most=arguments.most,
        workers=arguments.workers,
    )
    (arguments.folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    log.info("%s", table(result))


if __name__ == "__main__":
    main()
