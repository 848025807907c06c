"""Logits of some rows of a pass are those of all of them: what the last layer leaves out changes nothing."""

from pathlib import Path

import pytest
import torch

from braidsdk.cache.pool import Pool
from braidsdk.engine.batch import Run, make_batch
from braidsdk.models.registry import load_model


@pytest.mark.parametrize("rows", [[29], [4, 29], [0, 5, 20]], ids=str)
def test_logits_of_some_rows(random_checkpoint: Path, rows: list[int]) -> None:
    model = load_model(random_checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    pool = Pool.for_model(model, 1 << 26)
    first, second = pool.take(5), pool.take(25)
    seen = Run(tuple(range(5)), (), first, 0, 0)
    runs = [seen, Run(tuple(range(30, 55)), (), second, 0, 0)]
    batch = make_batch(runs, pool)
    whole = model.forward(batch, pool.kv, torch.arange(30))
    some = model.forward(batch, pool.kv, torch.tensor(rows))
    assert whole is not None
    assert some is not None
    torch.testing.assert_close(some, whole[rows], rtol=1e-4, atol=1e-4)
