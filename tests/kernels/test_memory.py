"""Memory for large tensors."""

import gc

import pytest
import torch

from braidsdk.kernels.memory import HUGE_PAGE_BYTES, empty

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (4, HUGE_PAGE_BYTES)], ids=["small", "empty", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_is_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = empty(shape, dtype, CPU).fill_(2.0)
    part = made[-1:]
    assert (made.shape, made.dtype, made.is_contiguous()) == (shape, dtype, True)
    del made
    gc.collect()
    assert bool((part == 2.0).all()), "the memory went while something still read it"


def test_more_than_there_is_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError):
        empty((1 << 62,), torch.float32, CPU)
    with pytest.raises(RuntimeError, match="can't be allocated"):
        empty((1 << 46,), torch.float32, CPU)
