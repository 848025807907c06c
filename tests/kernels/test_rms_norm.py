"""RMSNorm against the float64 reference, in Triton's interpreter where there is no GPU."""

from dataclasses import dataclass

import pytest
import torch

from braidsdk.kernels.rms_norm import rms_norm

EPS = 1e-6


@pytest.mark.parametrize("rows", [1, 7, 65])
@pytest.mark.parametrize("size", [16, 96, 896, 4096])
def test_equals_the_truth(rows, size, dtype, device, seed, poisoned, fenced, assert_near) -> None:
    x = torch.randn(rows, size, device=device).to(dtype)
    weight = (torch.rand(size, device=device) * 100).to(dtype)
    truth = rms_norm(x.double(), weight.double(), EPS)
    assert_near(rms_norm(fenced(x), fenced(weight), EPS, backend="triton"), truth, dtype)


def test_rounds_before_the_weight_is_multiplied(device) -> None:
    """The other order, or one rounding less, gives other bits in about a tenth of all places."""
    torch.manual_seed(0)
    x = torch.randn(64, 256, device=device).half()
    weight = (torch.rand(256, device=device) * 100).half()
    ours, theirs = rms_norm(x, weight, EPS, backend="triton"), rms_norm(x, weight, EPS)
    assert (ours != theirs).double().mean() < 0.01  # a float32 sum in another order moves the few that lie on an edge


def test_leading_dimensions_and_no_rows(device, seed) -> None:
    weight = torch.rand(32, device=device)
    x = torch.randn(3, 5, 32, device=device)
    ours = rms_norm(x, weight, EPS, backend="triton")
    torch.testing.assert_close(ours, rms_norm(x, weight, EPS), rtol=1e-5, atol=1e-6)
    assert rms_norm(x[:0], weight, EPS, backend="triton").shape == (0, 5, 32)


@dataclass(frozen=True)
class Refusal:
    """Arguments that Triton's path refuses, and what the message says."""

    x: torch.Tensor
    weight: torch.Tensor
    says: str


@pytest.mark.parametrize(
    "case",
    [
        Refusal(torch.ones(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), "float64"),
        Refusal(torch.ones(2, 8), torch.ones(8).half(), "expected tensors contiguous, torch.float32 on"),
        Refusal(torch.ones(8, 2).t(), torch.ones(8), "contiguous"),
        Refusal(torch.ones(2, 8), torch.ones(7), r"weight of shape \[8\], got \[7\]"),
    ],
    ids=lambda case: case.says,
)
def test_refuses(case, device) -> None:
    with pytest.raises(ValueError, match=case.says):
        rms_norm(case.x.to(device), case.weight.to(device), EPS, backend="triton")


def test_without_a_device_for_it_triton_is_an_error_and_no_fallback(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="CUDA"):
        rms_norm(torch.ones(2, 8), torch.ones(8), EPS, backend="triton")
    monkeypatch.setattr("braidsdk.kernels.checks.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="package triton"):
        rms_norm(torch.ones(2, 8), torch.ones(8), EPS, backend="triton")
