"""Products of several rows with a weight against float64, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from braidsdk.kernels.launch import Tile
from braidsdk.kernels.products import launch, products


def tile(stages: int = 2) -> Tile:
    return Tile(block_n=16, block_k=64, warps=4, stages=stages)


@pytest.mark.parametrize(("size", "stages"), [(64, 1), (256, 4), (256, 1), (330, 3), (704, 2), (100, 8)])
@pytest.mark.parametrize("programs", [1, 12, 1000])
@pytest.mark.parametrize("rows", [1, 40])
def test_parts_add_up_to_the_product(
    rows, programs, size, stages, dtype, device, monkeypatch, seed, poisoned, fenced, assert_near
) -> None:
    """Columns in one part or several, all of them in flight at once or not, with a remainder or none."""
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    x = torch.randn(rows, size, device=device).to(dtype)
    weight = (torch.randn(72, size, device=device) * size**-0.5).to(dtype)
    parts = products(fenced(x), fenced(weight), 32, tile(stages))
    assert_near(parts.double().sum(0), x.double() @ weight.double().T, dtype)


def test_columns_are_split_no_further_than_needed(device, monkeypatch) -> None:
    """Not beyond what the shape allows, nor so that a part has no columns, nor once there are programs enough."""
    monkeypatch.setattr(launch, "PROGRAMS", 8)

    def parts(size: int, count: int) -> int:
        x, weight = torch.ones(3, size, device=device), torch.ones(count, size, device=device)
        return len(products(x, weight, 16, tile()))

    assert [parts(size, 32) for size in (16, 32, 48, 160, 256)] == [1, 1, 2, 3, 4]
    assert [parts(256, count) for count in (64, 128)] == [2, 1]
