"""Training rows: one set of documents followed by several questions, each blind to the others.

A row holds the documents once and its questions as branches. A branch sees the documents and itself, and its positions
go on from the end of the documents. So every branch gets exactly what its own prompt would give it under plain full
attention, for the price of one pass over the documents.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from braidsdk.models.tiny.layout import Layout
from braidsdk.models.tiny.phrases import RELATIONS, SYSTEM_PROMPTS
from braidsdk.models.tiny.world import Kind, Sample, make_sample

__all__ = ["KINDS", "Batch", "Packed", "Rows", "draw_sample"]

DOCUMENT_LENGTHS = (
    *range(64, 385, 64), *(512, 640, 768, 960, 1152, 1408, 1728, 2112, 2560, 3072, 3584, 4096, 4864),
)  # fmt: skip
"""Lengths of the documents' part of a row, in tokens. The part is padded to the next length. A longer row is
dropped."""

QUESTION_LENGTHS = (192, 256, 384, 512, 640, 768)
"""Lengths of the questions' part."""

KINDS: tuple[Kind, ...] = ("direct", "alias", "chain", "name", "unknown")
KIND_WEIGHTS = (0.20, 0.38, 0.30, 0.03, 0.09)
EASY_KIND_WEIGHTS = (0.15, 0.35, 0.37, 0.10, 0.03)
DOCUMENTS = ((1, 4), (5, 12), (13, 24), (25, 60), (0, 0))
DOCUMENTS_WEIGHTS = (0.30, 0.49, 0.13, 0.07, 0.01)
NO_SYSTEM = 0.15
NO_HEADER = 0.08
REPEATED = 0.03
_Ranges = tuple[tuple[int, int], ...]
FACTS: tuple[_Ranges, ...] = (((1, 8),), ((1, 3),), ((5, 9),), ((1, 2), (1, 8), (6, 14)))
LONG_FACTS: tuple[_Ranges, ...] = (((1, 5),), ((1, 3),), ((1, 2), (1, 2), (1, 8)))

Packed = tuple[torch.Tensor, int]
"""`[4, rows, length]` int16 with ids, branch, positions and answer (see `Batch`), and the length of the documents'
part."""


def draw_sample(rng: random.Random, easy: float = 0.0) -> Sample:
    """Generate one sample of the training mixture, or, with probability `easy`, one of the first lessons.

    The mixture mostly has one to twelve documents, sometimes up to twenty-four, and rarely up to sixty. Some texts are
    one document with nothing before it, as in a prompt without a system block or in a composition. The first lessons
    are short and have few relations, so that several places compete for each question and only the aliases tell which
    one is meant.
    """
    header = rng.random() >= NO_HEADER
    few = rng.sample(RELATIONS, rng.randint(1, 4))
    if rng.random() < easy:
        documents, facts, relations, weights = rng.randint(1, 5), FACTS[1], few, EASY_KIND_WEIGHTS
    else:
        documents = rng.randint(*rng.choices(DOCUMENTS, DOCUMENTS_WEIGHTS)[0])
        facts = rng.choices(FACTS, (5, 2, 2, 2))[0] if documents <= 30 else rng.choice(LONG_FACTS)
        relations, weights = few if rng.random() < 0.25 else list(RELATIONS), KIND_WEIGHTS
    documents = documents if header else 1
    count = rng.choice((6, 12) if documents <= 4 else (12, 20)) if documents <= 24 else 24
    kinds = rng.choices(KINDS, weights, k=count) if documents else [KINDS[-1]] * 2
    sample = make_sample(
        rng,
        "train",
        documents=documents,
        facts=facts,
        kinds=kinds,
        relations=relations,
        clauses=rng.choices((0.0, 0.12, 0.3), (4, 3, 3))[0],
        system=None if not header or rng.random() < NO_SYSTEM else rng.choice(SYSTEM_PROMPTS),
    )
    if documents and rng.random() < REPEATED:
        sample = replace(sample, documents=(*sample.documents, rng.choice(sample.documents)))
    return replace(sample, header=header)


@dataclass(frozen=True)
class Batch:
    """Rows of one length, all `[rows, length]` int64.

    `branch` is 0 in the documents, 1.. in the questions, and -1 in the padding. `answer` is 1 + the index of the
    question's kind in `KINDS` on the tokens to be learned, and 0 elsewhere. The documents and their padding take the
    first `documents` positions of every row, and the questions take the rest.
    """

    ids: torch.Tensor
    branch: torch.Tensor
    positions: torch.Tensor
    answer: torch.Tensor
    documents: int

    @classmethod
    def unpack(cls, packed: Packed, device: torch.device) -> "Batch":
        """Make a batch from what `Rows` yields."""
        tensor, documents = packed
        ids, branch, positions, answer = tensor.to(device, non_blocking=True).long()
        return cls(ids, branch, positions, answer, documents)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[rows, 1, questions, length]` for `branch_attention`: causal, and no branch sees another."""
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()[self.documents :]
        keys, queries = self.branch[:, None, :], self.branch[:, self.documents :, None]
        visible = causal & ((keys == 0) | (keys == queries))
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[
            :, None
        ]

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(next ids, which of them count) for positions 0 to length - 2. A branch's first token has no target."""
        return self.ids[:, 1:], (self.branch[:, 1:] == self.branch[:, :-1]) & (self.branch[:, 1:] >= 0)


class Rows(IterableDataset[Packed]):
    """Endless batches of about `tokens` tokens.

    Worker w of n samples from its own generator, seeded by (seed, w), so n workers repeat nothing. `easy`, the share of
    first lessons, is in shared memory: the training loop lowers it while the workers run.
    """

    def __init__(self, tokenizer: Path, tokens: int, seed: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.seed = seed
        self.easy = torch.ones(1).share_memory_()

    def __iter__(self) -> Iterator[Packed]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        layout = Layout(Tokenizer.from_file(str(self.tokenizer)))
        waiting: dict[tuple[int, int], list[_Row]] = {}
        while True:
            row = _Row.build(layout, draw_sample(rng, float(self.easy[0])))
            shape = _padded(row.documents, DOCUMENT_LENGTHS), _padded(len(row.ids) - row.documents, QUESTION_LENGTHS)
            if 0 in shape:
                continue
            rows = waiting.setdefault(shape, [])
            rows.append(row)
            if len(rows) == max(1, self.tokens // sum(shape)):
                values = [row.padded(*shape, layout.pad) for row in rows]
                yield torch.tensor(values, dtype=torch.int16).transpose(0, 1), shape[0]
                rows.clear()


def _padded(length: int, lengths: tuple[int, ...]) -> int:
    """The first of `lengths` that is long enough, or 0."""
    return next((enough for enough in lengths if enough >= length), 0)


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    branch: list[int]
    positions: list[int]
    answer: list[int]
    documents: int

    @classmethod
    def build(cls, layout: Layout, sample: Sample) -> "_Row":
        prefix = layout.prefix(sample.system, sample.documents, header=sample.header).ids
        start = len(prefix)
        ids, branch, positions, answer = list(prefix), [0] * start, list(range(start)), [0] * start
        turns = layout.turns([q.text for q in sample.questions], [q.answer for q in sample.questions])
        for number, (asked, (question, reply)) in enumerate(zip(sample.questions, turns, strict=True), start=1):
            length = len(question) + len(reply)
            ids += question + reply
            branch += [number] * length
            positions += range(start, start + length)
            answer += [0] * len(question) + [1 + KINDS.index(asked.kind)] * len(reply)
        return cls(ids, branch, positions, answer, start)

    def padded(self, documents: int, questions: int, pad: int) -> list[list[int]]:
        """The four lists, with `documents` and `questions` tokens in the two parts."""
        gap = documents - self.documents
        rest = questions - (len(self.ids) - self.documents)

        def fill(values: list[int], padding: int) -> list[int]:
            return values[: self.documents] + [padding] * gap + values[self.documents :] + [padding] * rest

        return [fill(self.ids, pad), fill(self.branch, -1), fill(self.positions, 0), fill(self.answer, 0)]
