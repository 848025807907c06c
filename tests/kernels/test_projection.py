"""Products over packed and plain weights against float64."""

import pytest
import torch

from braidsdk.kernels.projection import pack, project

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("rows", [1, 2, 31, 33, 300])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_product_is_rounded_as_its_dtype_asks(rows: int, biased: bool, added: bool, packed: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(160, 96).bfloat16()
    bias = torch.randn(160).bfloat16() if biased else None
    residual = 8 * torch.randn(rows, 160).bfloat16() if added else None
    truth = x.double() @ weight.double().T
    truth = truth if bias is None else truth + bias.double()
    truth = truth if residual is None else truth + residual.double()
    got = project(x, pack(weight) if packed else weight, bias, residual)
    assert (got.dtype, got.shape) == (torch.bfloat16, truth.shape)
    roundings = 1 if packed and BF16 else 1 + biased + added
    best = (truth.bfloat16().double() - truth).norm()
    assert (got.double() - truth).norm() <= 1.1 * roundings * best


def test_float32_is_never_packed() -> None:
    weight = torch.randn(8, 4)
    assert pack(weight) is weight
    x = torch.randn(1, 4)
    torch.testing.assert_close(project(x, weight), x @ weight.T)
