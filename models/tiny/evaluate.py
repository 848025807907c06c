"""Measure a checkpoint on names it never saw: `python -m braidsdk.models.tiny.evaluate FOLDER`.

An answer counts only if every token of it, the end token included, is the model's first choice. One pass over prompt
and answer decides that: greedy decoding gives the answer exactly if each token is the first choice after those before.

Composition is emulated with attention masks, positions staying absolute: `isolated` documents see themselves alone,
`anchored` ones the system block too; the question sees everything.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from braidsdk.models.tiny.layout import Layout
from braidsdk.models.tiny.world import Kind, Sample, make_sample

__all__ = ["Case", "Mode", "evaluate", "load", "score", "table"]

log = logging.getLogger(__name__)

Mode = Literal["exact", "anchored", "isolated"]
MODES: tuple[Mode, ...] = get_args(Mode)
DOCUMENTS = (1, 2, 4, 6, 10, 16)
KINDS: tuple[Kind, ...] = ("direct", "alias", "unknown")


@dataclass(frozen=True)
class Case:
    """One prompt and the answer to it. `pieces[t]` is 0 in the system block, 1.. in the documents, -1 after them."""

    ids: list[int]
    pieces: list[int]
    answer: list[int]

    @classmethod
    def build(cls, layout: Layout, system: str | None, documents: Sequence[str], question: str, answer: str) -> "Case":
        """From texts; `answer` with its full stop."""
        prefix = layout.prefix(system, documents)
        starts = (0, *prefix.bounds[:-1])
        pieces = [piece for piece, ends in enumerate(zip(starts, prefix.bounds, strict=True)) for _ in range(*ends)]
        question_ids = layout.question(question)
        answer_ids = layout.encode([answer])[0] + layout.end
        tail = len(question_ids) + len(answer_ids)
        return cls(prefix.ids + question_ids + answer_ids, pieces + [-1] * tail, answer_ids)


def load(folder: Path, device: torch.device) -> tuple[Qwen3ForCausalLM, Layout]:
    """The checkpoint as shipped (bfloat16 weights, computed in float32) and its layout."""
    model = Qwen3ForCausalLM.from_pretrained(folder)
    model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    return model, Layout(Tokenizer.from_file(str(folder / "tokenizer.json")))


def _batches(cases: Sequence[Case], tokens: int) -> Iterator[list[int]]:
    """Indices of cases of like length, at most `tokens` tokens with their padding."""
    waiting: list[int] = []
    for index in sorted(range(len(cases)), key=lambda i: len(cases[i].ids)):
        if waiting and (len(waiting) + 1) * len(cases[index].ids) > tokens:
            yield waiting
            waiting = []
        waiting.append(index)
    yield waiting


def _mask(pieces: torch.Tensor, mode: Mode) -> torch.Tensor:
    """Boolean attention mask `[cases, 1, length, length]` from `pieces` `[cases, length]`."""
    length = pieces.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=pieces.device).tril().expand(len(pieces), -1, -1)
    if mode != "exact":
        keys, queries = pieces[:, None, :], pieces[:, :, None]
        seen = (keys == queries) | (queries == -1)
        visible = visible & (seen | (keys == 0) if mode == "anchored" else seen)
    return visible[:, None]


@torch.no_grad()
def score(model: Qwen3ForCausalLM, cases: Sequence[Case], mode: Mode, *, batch_tokens: int = 65_536) -> list[bool]:
    """Whether the model gives each case's answer, in the order of `cases`."""
    device = model.device
    right = [False] * len(cases)
    for indices in _batches(cases, batch_tokens):
        length = max(len(cases[i].ids) for i in indices)
        ids = torch.tensor([cases[i].ids + [0] * (length - len(cases[i].ids)) for i in indices], device=device)
        pieces = [cases[i].pieces + [-1] * (length - len(cases[i].pieces)) for i in indices]
        mask = _mask(torch.tensor(pieces, device=device), mode)
        positions = torch.arange(length, device=device).expand(len(indices), -1)
        chosen = model(
            ids, attention_mask={"full_attention": mask}, position_ids=positions, use_cache=False
        ).logits.argmax(-1)
        for row, i in zip(chosen.tolist(), indices, strict=True):
            end = len(cases[i].ids) - 1
            right[i] = row[end - len(cases[i].answer) : end] == cases[i].answer
    return right


def held_out_sample(documents: int, kind: Kind, number: int) -> Sample:
    """Sample `number` of a cell: one question of `kind` over `documents` documents, names of the test split."""
    return make_sample(random.Random(f"cell/{documents}/{kind}/{number}"), "test", documents=documents, kinds=[kind])


def _cell(folder: Path, kind: Kind, documents: int, questions: int) -> list[Case]:
    layout = Layout(Tokenizer.from_file(str(folder / "tokenizer.json")))
    samples = [held_out_sample(documents, kind, number) for number in range(questions)]
    return [
        Case.build(layout, sample.system, sample.documents, question.text, question.answer)
        for sample in samples
        for question in sample.questions
    ]


def evaluate(
    folder: Path, device: torch.device, *, questions: int = 500, documents: Sequence[int] = DOCUMENTS
) -> dict[str, object]:
    """Accuracy of every cell, as `evaluation.json` holds it."""
    wanted = [(kind, count) for kind in KINDS for count in documents]
    with ProcessPoolExecutor() as pool:
        written = [pool.submit(_cell, folder, kind, count, questions) for kind, count in reversed(wanted)]
        cases_of_cells = [future.result() for future in reversed(written)]
    model, _ = load(folder, device)
    cells: list[dict[str, object]] = []
    for (kind, count), cases in zip(wanted, cases_of_cells, strict=True):
        accuracy: dict[str, object] = {mode: sum(score(model, cases, mode)) / len(cases) for mode in MODES}
        tokens = round(sum(len(case.ids) - len(case.answer) for case in cases) / len(cases))
        cells.append({"kind": kind, "documents": count, "prompt_tokens": tokens, **accuracy})
        log.info("%s", cells[-1])
    dtype = str(model.dtype).removeprefix("torch.")
    return {"split": "test", "questions_per_cell": questions, "computed_in": dtype, "cells": cells}


def table(evaluation: dict[str, object]) -> str:
    """The model card's table, from the content of `evaluation.json`."""
    cells = evaluation["cells"]
    if not isinstance(cells, list):
        raise ValueError("expected a list under 'cells', as evaluation.json has it")
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = evaluate(arguments.folder, torch.device(arguments.device), questions=arguments.questions)
    (arguments.folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    log.info("%s", table(result))


if __name__ == "__main__":
    main()
