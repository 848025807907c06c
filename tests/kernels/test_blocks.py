"""Work by blocks of rows is the work on all rows."""

import pytest
import torch
from torch import Tensor

from braidsdk.kernels import blocks
from braidsdk.kernels.blocks import in_blocks


@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 13])
def test_blocks_give_what_all_rows_give(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ELEMENTS", 6 * 2 * 4)
    x, y = torch.randn(rows, 2, 4), torch.randn(rows, 3)
    seen = []

    def compute(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return x.sum(-1) * y.sum(-1, keepdim=True)

    assert torch.equal(in_blocks(compute, x, y), x.sum(-1) * y.sum(-1, keepdim=True))
    assert sum(seen) == rows
    assert max(seen) <= 6
