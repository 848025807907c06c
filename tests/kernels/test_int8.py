"""Triton's linear operations over weights in int8, against the float64 references over what those stand for."""

import pytest
import torch
from torch import Tensor

from braidsdk.kernels.head import norm_head
from braidsdk.kernels.head.reference import norm_head_reference
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.norm_qkv.reference import norm_qkv_reference
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.out_proj.reference import out_proj_reference
from braidsdk.kernels.swiglu import norm_swiglu
from braidsdk.kernels.swiglu.reference import norm_swiglu_reference
from braidsdk.kernels.weight import Int8, quantised

EPS = 1e-6
ROWS = [1, 2, 5, 17, 65]
"""Few by multiplying in registers, several by matrix instructions, many by the library's product."""

SIZES = [(128, 64), (96, 34), (300, 20), (1056, 70)]
"""Columns and outputs: one group, and last ones of 96, 44 and 32 columns."""


def wide(weight: Int8) -> Tensor:
    return weight.dense(torch.float64)


@pytest.fixture
def draw(dtype, device):
    def made(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    return made


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "outputs"), SIZES)
def test_projections(rows, size, outputs, draw, dtype, seed, poisoned, assert_near) -> None:
    x, residual, weight = draw(rows, size), draw(rows, outputs), quantised(draw(outputs, size, scale=size**-0.5))
    for bias in (None, draw(outputs)):
        truth = out_proj_reference(x.double(), wide(weight), None if bias is None else bias.double(), residual.double())
        assert_near(out_proj(x, weight, bias, residual, backend="triton"), truth, dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "outputs"), SIZES)
def test_gates_and_logits(rows, size, outputs, draw, dtype, seed, poisoned, assert_near) -> None:
    hidden, norm = draw(rows, size, scale=3.0), draw(size).abs() + 0.5
    weight = quantised(draw(2 * outputs, size, scale=size**-0.5))
    for run, reference in ((norm_swiglu, norm_swiglu_reference), (norm_head, norm_head_reference)):
        truth = reference(hidden.double(), norm.double(), wide(weight), EPS)
        assert_near(run(hidden, norm, weight, EPS, backend="triton"), truth, dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "head_dim"), [(96, 32), (300, 80)])
def test_heads(rows, size, head_dim, draw, dtype, device, seed, poisoned, assert_near) -> None:
    hidden, norm = draw(rows, size, scale=3.0), draw(size).abs() + 0.5
    weight, bias = quantised(draw(4 * head_dim, size, scale=size**-0.5)), draw(4 * head_dim)
    angles = torch.rand(rows, head_dim // 2, device=device, dtype=torch.float64) * 6.28
    kv = torch.full((2, 6, 1, 16, head_dim), float("nan"), device=device, dtype=dtype)
    slots = torch.randperm(96, device=device)[:rows]
    truth, weights = kv.double(), NormQKVWeights(norm, weight, bias)
    queries = norm_qkv(hidden, weights, EPS, angles.cos().float(), angles.sin().float(), kv, slots, backend="triton")
    plain = NormQKVWeights(norm.double(), wide(weight), bias.double())
    turned = (angles.cos().float().double(), angles.sin().float().double())
    assert_near(queries, norm_qkv_reference(hidden.double(), plain, EPS, *turned, truth, slots), dtype)
    written = ~truth.isnan()
    assert torch.equal(written, ~kv.isnan())
    assert_near(kv[written], truth[written], dtype)
