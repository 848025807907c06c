"""Training rows: one set of documents followed by several questions, each blind to the others.

A row holds the documents once and its questions as branches: a branch sees the documents and itself, and its positions
go on from the end of the documents. Every branch so gets exactly what a prompt of its own would give it, under plain
full attention, for the price of one pass over the documents.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from braidsdk.models.tiny.layout import Layout
from braidsdk.models.tiny.world import RELATIONS, SYSTEM_PROMPTS, Kind, Sample, make_sample

__all__ = ["KINDS", "Batch", "Rows", "draw_sample"]

BUCKETS = (128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1920, 2304)
"""Row lengths. A row is padded to the next one; a longer row is dropped."""

QUESTIONS = (6, 12)
"""Questions of a row: with up to four documents, with more."""

KINDS: tuple[Kind, ...] = ("direct", "alias", "name", "unknown")
KIND_WEIGHTS = (0.48, 0.38, 0.07, 0.07)
EASY_KIND_WEIGHTS = (0.28, 0.52, 0.17, 0.03)
NO_SYSTEM = 0.15


def draw_sample(rng: random.Random, easy: float = 0.0) -> Sample:
    """One sample of the training mixture, or, with probability `easy`, one of the first lessons.

    The mixture has mostly one to eight documents, now and then up to twenty. The first lessons are short and of few
    relations, so that several places compete for each question and only the alias tells which is meant.
    """
    few = rng.sample(RELATIONS, rng.randint(1, 4))
    if rng.random() < easy:
        documents, facts, relations, weights = rng.randint(1, 4), (1, 3), few, EASY_KIND_WEIGHTS
    else:
        documents = rng.randint(9, 20) if rng.random() < 0.22 else rng.randint(1, 8)
        facts = rng.choices(((1, 8), (1, 3), (5, 9)), (5, 3, 2))[0]
        relations, weights = few if rng.random() < 0.3 else list(RELATIONS), KIND_WEIGHTS
    kinds = rng.choices(KINDS, weights, k=QUESTIONS[documents > 4])
    system = None if rng.random() < NO_SYSTEM else rng.choice(SYSTEM_PROMPTS)
    return make_sample(rng, "train", documents=documents, facts=facts, kinds=kinds, relations=relations, system=system)


@dataclass(frozen=True)
class Batch:
    """Rows of one length, all `[rows, length]` int64.

    `branch` is 0 in the documents, 1.. in the questions, -1 in the padding; `answer` is 0 but
    on the tokens to be learned, where it is 1 + the index of the question's kind in `KINDS`.
    """

    ids: torch.Tensor
    branch: torch.Tensor
    positions: torch.Tensor
    answer: torch.Tensor

    @classmethod
    def unpack(cls, packed: torch.Tensor, device: torch.device) -> "Batch":
        """From the `[4, rows, length]` int16 tensor that `Rows` yields."""
        ids, branch, positions, answer = packed.to(device, non_blocking=True).long()
        return cls(ids, branch, positions, answer)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive attention mask `[rows, 1, length, length]`: causal, and no branch sees another."""
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        keys, queries = self.branch[:, None, :], self.branch[:, :, None]
        visible = causal & ((keys == 0) | (keys == queries))
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[
            :, None
        ]

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(next ids, which of them count) for positions 0 to length - 2; a branch's first token has no target."""
        return self.ids[:, 1:], (self.branch[:, 1:] == self.branch[:, :-1]) & (self.branch[:, 1:] >= 0)


class Rows(IterableDataset[torch.Tensor]):
    """Endless batches of about `tokens` tokens, each an int16 tensor `[4, rows, length]` (see `Batch`).

    Worker w of n draws from its own generator, seeded by (seed, w), so n workers repeat nothing. `easy`, the share of
    first lessons, is shared memory: the training loop lowers it while the workers run.
    """

    def __init__(self, tokenizer: Path, tokens: int, seed: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.seed = seed
        self.easy = torch.ones(1).share_memory_()  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        layout = Layout(Tokenizer.from_file(str(self.tokenizer)))
        waiting: dict[int, list[_Row]] = {length: [] for length in BUCKETS}
        while True:
            row = _Row.build(layout, draw_sample(rng, float(self.easy[0])))
            length = next((bucket for bucket in BUCKETS if bucket >= len(row.ids)), None)
            if length is None:
                continue
            rows = waiting[length]
            rows.append(row)
            if len(rows) == max(1, self.tokens // length):
                yield torch.tensor([row.padded(length, layout.pad) for row in rows], dtype=torch.int16).transpose(0, 1)
                rows.clear()


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    branch: list[int]
    positions: list[int]
    answer: list[int]

    @classmethod
    def build(cls, layout: Layout, sample: Sample) -> "_Row":
        prefix = layout.prefix(sample.system, sample.documents).ids
        start = len(prefix)
        ids, branch, positions, answer = list(prefix), [0] * start, list(range(start)), [0] * start
        turns = layout.turns([q.text for q in sample.questions], [q.answer for q in sample.questions])
        for number, (asked, (question, reply)) in enumerate(zip(sample.questions, turns, strict=True), start=1):
            length = len(question) + len(reply)
            ids += question + reply
            branch += [number] * length
            positions += range(start, start + length)
            answer += [0] * len(question) + [1 + KINDS.index(asked.kind)] * len(reply)
        return cls(ids, branch, positions, answer)

    def padded(self, length: int, pad: int) -> list[list[int]]:
        rest = length - len(self.ids)
        return [
            self.ids + [pad] * rest,
            self.branch + [-1] * rest,
            self.positions + [0] * rest,
            self.answer + [0] * rest,
        ]
