"""Projection and residual against the float64 reference, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from braidsdk.kernels.out_proj import launch, out_proj
from braidsdk.kernels.products import launch as products_launch

SIZES = (2048, 1024) if torch.cuda.is_available() else (256, 64)
"""Columns and rows of the weight, for statistics: Qwen3-0.6B's, or what the interpreter does in a second."""


def arguments(rows, size, hidden, bias, dtype, device):
    """Random x, weight, bias and residual."""
    x = torch.randn(rows, size, device=device).to(dtype)
    weight = (torch.randn(hidden, size, device=device) * size**-0.5).to(dtype)
    offset = torch.randn(hidden, device=device).to(dtype) if bias else None
    return x, weight, offset, torch.randn(rows, hidden, device=device).to(dtype)


def wide(values):
    return [value if value is None else value.double() for value in values]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 33, 65])
def test_equals_the_truth(rows, bias, dtype, device, seed, poisoned, assert_near) -> None:
    values = arguments(rows, 160, 70, bias, dtype, device)
    assert_near(out_proj(*values, backend="triton"), out_proj(*wide(values)), dtype)


@pytest.mark.parametrize("rows", [1, 17])
def test_sizes_over_several_blocks(rows, dtype, device, seed, poisoned, assert_near) -> None:
    """More columns than are in flight at once, and a number of them that is no multiple of a block."""
    values = arguments(rows, 2536, 33, False, dtype, device)
    assert_near(out_proj(*values, backend="triton"), out_proj(*wide(values)), dtype)


@pytest.mark.parametrize("programs", [1, 1000], ids=["", "columns split"])
@pytest.mark.parametrize("rows", [2, 16, 64])
def test_rows_of_a_program_and_parts_of_the_columns_change_rounding_only(
    rows, programs, device, monkeypatch, tiles_of, seed, poisoned, assert_near
) -> None:
    """Whatever entry of the table serves, alone or several programs of it."""
    monkeypatch.setattr(launch, "FEW_ROWS", 128)
    monkeypatch.setattr(launch, "TILES", tiles_of(rows, launch.TILES))
    monkeypatch.setattr(products_launch, "PROGRAMS", programs)
    values = arguments(rows + 5, 336, 40, True, torch.float32, device)
    assert_near(out_proj(*values, backend="triton"), out_proj(*wide(values)), torch.float32)


@pytest.mark.parametrize("size", [2048, 3072, 2560])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_nothing_is_read_past_the_ends(rows, size, dtype, device, seed, poisoned, fenced, assert_near) -> None:
    values = arguments(rows, size, 8, True, dtype, device)
    assert_near(out_proj(*map(fenced, values), backend="triton"), out_proj(*wide(values)), dtype)


@pytest.mark.parametrize("rows", [2, 33])
def test_is_as_close_to_the_truth_as_torch(rows, dtype, device, assert_as_good) -> None:
    if dtype == torch.float32:
        pytest.skip("float32 rounds nothing but its sums")

    def results():
        values = arguments(rows, *SIZES, False, dtype, device)
        return out_proj(*values, backend="triton"), out_proj(*values), out_proj(*wide(values))

    assert_as_good(results)


def test_no_rows(device) -> None:
    assert out_proj(*arguments(0, 32, 16, False, torch.float32, device), backend="triton").shape == (0, 16)


def test_shapes_are_checked(device) -> None:
    x, weight, _, residual = arguments(2, 32, 16, False, torch.float32, device)
    with pytest.raises(ValueError, match=r"residual of shape \[2, 16\], got \[1, 16\]"):
        out_proj(x, weight, None, residual[:1], backend="triton")
    with pytest.raises(ValueError, match=r"weight of shape \[16, 32\], got \[16, 31\]"):
        out_proj(x, weight[:, :31].contiguous(), None, residual, backend="triton")
