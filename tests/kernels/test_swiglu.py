"""RMSNorm, gate, up and SwiGLU against the float64 reference, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from braidsdk.kernels.products import launch as products_launch
from braidsdk.kernels.swiglu import launch, norm_swiglu

EPS = 1e-6
SIZES = (1024, 3072) if torch.cuda.is_available() else (256, 64)
"""Hidden and intermediate, for statistics: Qwen3-0.6B's, or what the interpreter does in a second."""


def arguments(rows, size, inner, dtype, device):
    """Random hidden states, norm, gate_up and eps."""
    hidden = torch.randn(rows, size, device=device).to(dtype)
    norm = (torch.rand(size, device=device) + 0.5).to(dtype)
    gate_up = (torch.randn(2 * inner, size, device=device) * 2 * size**-0.5).to(dtype)
    return hidden, norm, gate_up, EPS


def truth(hidden, norm, gate_up, eps):
    return norm_swiglu(hidden.double(), norm.double(), gate_up.double(), eps)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 33, 65])
@pytest.mark.parametrize(("size", "inner"), [(96, 168), (160, 13)])
def test_equals_the_truth(rows, size, inner, dtype, device, seed, poisoned, assert_near) -> None:
    values = arguments(rows, size, inner, dtype, device)
    assert_near(norm_swiglu(*values, backend="triton"), truth(*values), dtype)


@pytest.mark.parametrize("rows", [1, 17])
def test_sizes_over_several_blocks(rows, dtype, device, seed, poisoned, assert_near) -> None:
    """More columns than are in flight at once, and a number of them that is no multiple of a block."""
    values = arguments(rows, 1300, 24, dtype, device)
    assert_near(norm_swiglu(*values, backend="triton"), truth(*values), dtype)


@pytest.mark.parametrize("size", [896, 2048, 2560])
@pytest.mark.parametrize("rows", [1, 3, 17, 65])
def test_nothing_is_read_past_the_ends(rows, size, dtype, device, seed, poisoned, fenced, assert_near) -> None:
    hidden, norm, gate_up, eps = arguments(rows, size, 8, dtype, device)
    ours = norm_swiglu(fenced(hidden), fenced(norm), fenced(gate_up), eps, backend="triton")
    assert_near(ours, truth(hidden, norm, gate_up, eps), dtype)


@pytest.mark.parametrize("programs", [1, 1000], ids=["", "columns split"])
@pytest.mark.parametrize("rows", [2, 16, 64])
def test_rows_of_a_program_and_parts_of_the_columns_change_rounding_only(
    rows, programs, device, monkeypatch, tiles_of, seed, poisoned, assert_near
) -> None:
    """Whatever entry of the table serves, alone or several programs of it."""
    monkeypatch.setattr(launch, "FEW_ROWS", 128)
    monkeypatch.setattr(launch, "TILES", tiles_of(rows, launch.TILES))
    monkeypatch.setattr(products_launch, "PROGRAMS", programs)
    values = arguments(rows + 5, 336, 40, torch.float32, device)
    assert_near(norm_swiglu(*values, backend="triton"), truth(*values), torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, under the interpreter: inf is meant
@pytest.mark.parametrize("rows", [1, 70])
def test_gates_far_out_stay_finite(rows, device, seed) -> None:
    hidden, norm, gate_up, eps = arguments(rows, 64, 40, torch.float32, device)
    gate_up[:40] *= 500
    ours = norm_swiglu(hidden, norm, gate_up, eps, backend="triton")
    torch.testing.assert_close(ours, norm_swiglu(hidden, norm, gate_up, eps), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rows", [2, 33, 65])
def test_is_as_close_to_the_truth_as_torch(rows, dtype, device, assert_as_good) -> None:
    if dtype == torch.float32:
        pytest.skip("float32 rounds nothing but its sums")

    def results():
        values = arguments(rows, *SIZES, dtype, device)
        return norm_swiglu(*values, backend="triton"), norm_swiglu(*values), truth(*values)

    assert_as_good(results)


def test_no_rows(device) -> None:
    assert norm_swiglu(*arguments(0, 32, 16, torch.float32, device), backend="triton").shape == (0, 16)


def test_shapes_are_checked(device) -> None:
    hidden, norm, gate_up, eps = arguments(2, 32, 16, torch.float32, device)
    with pytest.raises(ValueError, match=r"norm of shape \[32\], got \[16\]"):
        norm_swiglu(hidden, norm[:16].contiguous(), gate_up, eps, backend="triton")
    with pytest.raises(ValueError, match=r"gate_up of shape \[30, 32\], got \[31, 32\]"):
        norm_swiglu(hidden, norm, gate_up[:31].contiguous(), eps, backend="triton")
