"""Measure a checkpoint on names it never saw: `python -m braidsdk.models.tiny.evaluate FOLDER`.

An answer counts only if every token of it, the end token included, is the model's first choice. One pass over prompt
and answer decides that: greedy decoding gives the answer exactly if each token is the first choice after those before.

Composition is emulated in the attention, positions staying absolute: `isolated` documents see themselves alone,
`anchored` ones the system block too; the question sees everything, other questions excepted.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Qwen3ForCausalLM

from braidsdk.models.tiny.layout import Layout, Prefix
from braidsdk.models.tiny.world import Kind, Sample, make_sample

__all__ = ["Asked", "Case", "Mode", "evaluate", "held_out_sample", "load", "score", "table"]

log = logging.getLogger(__name__)

Mode = Literal["exact", "anchored", "isolated"]
MODES: tuple[Mode, ...] = get_args(Mode)

Asked = Literal["direct", "clause", "alias", "chain", "mixed", "unknown"]
"""What a cell asks: a kind of question; `clause`, direct where every fact goes on after its value; or any kind."""

DOCUMENTS: dict[Asked, tuple[int, ...]] = {
    "direct": (1, 2, 4, 6, 10, 16, 30, 60),
    "clause": (1, 6, 16),
    "alias": (1, 2, 4, 6, 10, 16, 30, 60),
    "chain": (2, 4, 6, 10, 60),
    "mixed": (2, 4, 6, 10),
    "unknown": (2, 6, 10, 60),
}
"""Numbers of documents in the cells."""

MIXED: dict[Kind, float] = {"direct": 0.4, "alias": 0.3, "chain": 0.15, "unknown": 0.15}
TOGETHER = ((6, 2), (16, 5), (60, 10))
"""(most documents, questions that share one set of documents): long documents are read for several questions."""

FACTS = {60: (1, 5)}
"""Fewest and most facts of a document, (1, 8) where nothing is said: 60 documents so have 4,096 tokens in the mean."""


@dataclass(frozen=True)
class Case:
    """Documents and the (question, answer) ids to try on them; every question is a prompt of its own."""

    prefix: Prefix
    turns: list[tuple[list[int], list[int]]]

    @classmethod
    def build(
        cls, layout: Layout, system: str | None, documents: Sequence[str], questions: Sequence[tuple[str, str]]
    ) -> "Case":
        """From texts; each answer with its full stop."""
        texts, answers = [question for question, _ in questions], [answer for _, answer in questions]
        return cls(layout.prefix(system, documents), layout.turns(texts, answers))


def load(folder: Path, device: torch.device) -> tuple[Qwen3ForCausalLM, Layout]:
    """The checkpoint as shipped (bfloat16 weights, computed in float32) and its layout."""
    model = Qwen3ForCausalLM.from_pretrained(folder)
    model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    return model, Layout(Tokenizer.from_file(str(folder / "tokenizer.json")))


@dataclass(frozen=True)
class _View:
    """What each part of a row sees; it stands in for an attention mask.

    `pieces` are (start, end) of the system block and the documents, or one piece of all for exact; `anchor` is the
    length of what every piece sees beside itself. `tails` `[1, 1, tokens, length]`, boolean, is for what follows them.
    """

    pieces: tuple[tuple[int, int], ...]
    anchor: int
    tails: torch.Tensor


def _attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _View,
    scaling: float,
    **_options: Any,  # what transformers hands to every attention function
) -> tuple[torch.Tensor, None]:
    """Attention `[1, length, heads, head_dim]` piece by piece, as composed caches have it."""
    view, groups = attention_mask, query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts = []
    for start, end in view.pieces:
        anchor = min(view.anchor, start)
        seen_key, seen_value = (torch.cat([x[:, :, :anchor], x[:, :, start:end]], dim=2) for x in (key, value))
        mask = None
        if anchor:
            mask = torch.ones(end - start, anchor + end - start, dtype=torch.bool, device=query.device).tril(anchor)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start:end], seen_key, seen_value, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        )
    tail = query[:, :, view.pieces[-1][1] :]
    parts.append(scaled_dot_product_attention(tail, key, value, attn_mask=view.tails, scale=scaling))
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("braid_tiny_pieces", _attention)


def _view(case: Case, mode: Mode, device: torch.device) -> _View:
    """What the parts of the case's row see in `mode`."""
    ends = case.prefix.bounds
    pieces = tuple(zip((0, *ends[:-1]), ends, strict=True)) if mode != "exact" else ((0, ends[-1]),)
    turn = torch.tensor([number for number, pair in enumerate(case.turns) for _ in range(sum(map(len, pair)))])
    own = (turn[:, None] == turn[None, :]).tril()
    tails = torch.cat([torch.ones(len(turn), ends[-1], dtype=torch.bool), own], dim=1)
    return _View(pieces, ends[0] if mode == "anchored" else 0, tails[None, None].to(device))


@torch.no_grad()
def score(model: Qwen3ForCausalLM, cases: Iterable[Case], mode: Mode) -> list[bool]:
    """Whether the model gives each question's answer, in order; the documents are computed once for a case."""
    model.set_attn_implementation("braid_tiny_pieces")
    right = []
    for case in cases:
        start = len(case.prefix.ids)
        ids, positions = list(case.prefix.ids), list(range(start))
        for question, answer in case.turns:
            ids += question + answer
            positions += range(start, start + len(question) + len(answer))
        chosen = (
            model(
                torch.tensor([ids], device=model.device),
                attention_mask={"full_attention": _view(case, mode, model.device)},
                position_ids=torch.tensor([positions], device=model.device),
                use_cache=False,
                logits_to_keep=len(ids) - start,
            )
            .logits[0]
            .argmax(-1)
        )
        end = 0
        for question, answer in case.turns:
            end += len(question) + len(answer)
            right.append(chosen[end - 1 - len(answer) : end - 1].tolist() == answer)
    model.set_attn_implementation("sdpa")
    return right


def held_out_sample(documents: int, asked: Asked, number: int, *, questions: int = 1) -> Sample:
    """Sample `number` of a cell: `questions` questions over `documents` documents, names of the test split."""
    rng = random.Random(f"cell/{documents}/{asked}/{number}")
    kinds: list[Kind]
    if asked == "mixed":
        kinds = rng.choices([*MIXED], [*MIXED.values()], k=questions)
    else:
        kinds = ["direct" if asked == "clause" else asked] * questions
    clauses = 1.0 if asked == "clause" else 0.12
    facts = FACTS.get(documents, (1, 8))
    return make_sample(rng, "test", documents=documents, facts=[facts], kinds=kinds, clauses=clauses)


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
