"""How far a request's logits depend on what else is computed with it."""

from pathlib import Path

import torch
from random_model import text_of
from torch import Tensor

from braidsdk import Braid
from braidsdk.engine.batch import Run, forward

REQUESTS, TOKENS = 64, 256
POOL_BYTES = 8 << 30


def batch_dependence(braid: Braid, checkpoint: Path, store: Path) -> dict[str, object]:
    """Logits of the last token of `REQUESTS` texts, each alone and all together, against float32 on torch's kernels.

    Errors are RMS over the RMS of the float32 logits.
    """
    alone, together = _logits(braid)
    with Braid(
        checkpoint, store=store, device=str(braid.device), dtype="float32", kernels="torch", pool_bytes=POOL_BYTES
    ) as wide:
        exact = _logits(wide)[1]

    def error(first: Tensor, second: Tensor) -> float:
        return float((first - second).norm() / exact.norm())

    chosen, among = alone.argmax(-1), together.argmax(-1)
    return {
        "requests": REQUESTS,
        "tokens": TOKENS,
        "alone": error(alone, exact),
        "together": error(together, exact),
        "between": error(alone, together),
        "greedy_equal": int((chosen == among).sum()),
        "greedy_alone_as_float32": int((chosen == exact.argmax(-1)).sum()),
        "greedy_together_as_float32": int((among == exact.argmax(-1)).sum()),
    }


def _logits(braid: Braid) -> tuple[Tensor, Tensor]:
    """Of each request by itself, and of all in one pass: float64 [requests, vocab_size], on the CPU."""
    engine = braid._engine
    model, pool = engine.model, engine.pool
    ids = [engine.layout.plain_ids(text_of(braid, TOKENS, 5000 + number)) for number in range(REQUESTS)]

    def logits(runs: list[Run]) -> Tensor:
        found = forward(model, pool, runs, [True] * len(runs))
        if found is None:
            raise RuntimeError("the model gave no logits")
        return found

    def compute() -> tuple[Tensor, Tensor]:
        pages = [pool.take(TOKENS) for _ in ids]
        try:
            texts = [Run(tuple(each[:-1]), (), own, 0, 0) for each, own in zip(ids, pages, strict=True)]
            steps = [Run((each[-1],), (), own, TOKENS - 1, 0) for each, own in zip(ids, pages, strict=True)]
            forward(model, pool, texts)
            alone, together = torch.cat([logits([step]) for step in steps]), logits(steps)
        finally:
            for own in pages:
                pool.give_back(own)
        return alone.double().cpu(), together.double().cpu()

    return engine.call(compute)
