"""Weights in 8-bit integers, and in blocks of rows."""

import pytest
import torch

from braidsdk.kernels.checks import check_tensors
from braidsdk.kernels.head import norm_head
from braidsdk.kernels.measure import _nbytes
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.swiglu import norm_swiglu
from braidsdk.kernels.weight import GROUP, Int8, Rows, quantised


@pytest.mark.parametrize("size", [GROUP, 41, 3 * GROUP + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_number_is_within_half_a_step_of_its_group(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    weight = (torch.randn(70, size) * torch.logspace(-3, 1, 70)[:, None]).to(dtype)
    weight[5] = 0
    made = quantised(weight)
    assert (made.values.dtype, made.shape, len(made)) == (torch.int8, weight.shape, 70)
    assert made.scales.shape == (70, -(-size // GROUP))
    steps = made.scales.repeat_interleave(GROUP, 1)[:, :size]
    error = (made.dense(torch.float64) - weight.double()).abs()
    assert (error <= 0.5001 * steps).all()
    assert made.values.abs().max() == 127
    for group, values in enumerate(made.values.split(GROUP, 1)):
        assert torch.equal(values.abs().amax(1) == 127, made.scales[:, group] > 0), "each group uses the whole range"


def test_rows_are_quantised_where_they_lie() -> None:
    weight = torch.randn(50, 200)
    whole, parts = quantised(weight), quantised(Rows(tuple(weight.split((20, 3, 27)))))
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.scales, parts.scales)


def test_torch_reads_a_weight_in_int8_as_the_numbers_that_it_stands_for() -> None:
    torch.manual_seed(0)
    weights = {name: quantised(torch.randn(out, 160)) for name, out in (("qkv", 128), ("two", 64), ("head", 300))}
    x, norm, slots = torch.randn(3, 160), torch.rand(160), torch.arange(3)
    angles = torch.rand(3, 16)

    def run(dense: bool) -> list[torch.Tensor]:
        given = {name: each.dense(torch.float32) if dense else each for name, each in weights.items()}
        kv = torch.zeros(2, 1, 1, 16, 32)
        packed = NormQKVWeights(norm, given["qkv"], None)
        return [
            norm_qkv(x, packed, 1e-6, angles, angles, kv, slots),
            kv,
            out_proj(x, given["two"], None, torch.zeros(3, 64)),
            norm_swiglu(x, norm, given["two"], 1e-6),
            norm_head(x, norm, given["head"], 1e-6),
        ]

    for ours, truth in zip(run(False), run(True), strict=True):
        assert torch.equal(ours, truth)


def test_what_a_backend_does_not_read_is_refused() -> None:
    x = torch.zeros(1, 160)
    with pytest.raises(ValueError, match="needs weights in one piece"):
        check_tensors("out_proj", "triton", x, Rows((torch.zeros(2, 160),)))
    with pytest.raises(ValueError, match=r"scales of shape \[2, 2\], got \[2, 1\]"):
        check_tensors("out_proj", "triton", x, Int8(torch.zeros(2, 160, dtype=torch.int8), torch.zeros(2, 1)))
    with pytest.raises(ValueError, match=r"torch\.int8 on cpu, got torch\.float32"):
        check_tensors("out_proj", "triton", x, Int8(torch.zeros(2, 160), torch.zeros(2, 2)))


def test_bytes_of_all_forms_are_counted() -> None:
    assert _nbytes(quantised(torch.zeros(10, 300))) == 10 * 300 + 10 * 3 * 4
    assert _nbytes(Rows((torch.zeros(2, 5), torch.zeros(1, 5)))) == 60


def test_pieces_are_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braidsdk.kernels.weight._PIECE", 500)
    made = quantised(torch.randn(7, 200))
    pieces = list(made.pieces())
    assert [len(piece) for piece in pieces] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([piece.dense(torch.float32) for piece in pieces]), made.dense(torch.float32))
    x, bias, residual = torch.randn(3, 200), torch.randn(7), torch.randn(3, 7)
    dense = out_proj(x, made.dense(torch.float32), bias, residual)
    torch.testing.assert_close(out_proj(x, made, bias, residual), dense)
