"""The choice of a token from its logits: the contract, its checks, and what computes it."""

from collections.abc import Callable

import torch
from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_like, check_shape
from braidsdk.kernels.sample.eager import sample_torch
from braidsdk.kernels.sample.launch import sample_triton
from braidsdk.kernels.sample.reference import Choices

BACKENDS: dict[Backend, Callable[[Tensor, Choices, Tensor], None]] = {
    "torch": sample_torch,
    "triton": sample_triton,
}


def sample(logits: Tensor, choices: Choices, *, out: Tensor | None = None, backend: Backend = "torch") -> Tensor:
    """Choose a token per row, each row in its own way. Random numbers depend on seed, step and token id alone, not on
    the batch, the backend or the device.

    Repetition penalty, temperature, top_k, top_p, min_p, in this order, as in transformers. Tokens equal to the last
    that top_k keeps are kept too; of tokens equal to the last that top_p needs, as many as it needs, the highest ids
    first. A greedy row gives the likeliest, the lowest id among equals.

    Args:
        logits: float32 [rows, vocab_size]; contiguous for Triton.
        choices: of these rows; changed as told there.
        out: takes the result; its rows may lie apart. Without it, the result is a new tensor.
        backend: "torch" or "triton"; neither falls back to the other. Both choose the same tokens but for rounding.

    Returns:
        Ids, and 1 where all of a row is finite, else 0; int64 [2, rows]. The id of a row that is not means nothing, but
        lies within the vocabulary.

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: shapes or dtypes are not as above.
    """
    rows, vocab = logits.shape
    check_shape("sample", "shape", choices.shape, 4, rows)
    check_shape("sample", "draws", choices.draws, 3, rows)
    check_shape("sample", "seen", choices.seen, rows, vocab)
    if logits.dtype != torch.float32:
        raise ValueError(f"sample: expected float32 logits, got {logits.dtype}; convert them first.")
    if out is None:
        out = torch.empty(2, rows, dtype=torch.int64, device=logits.device)
    check_shape("sample", "out", out, 2, rows)
    check_like("sample", out[0], torch.int64, logits.device, "out")
    BACKENDS[backend](logits, choices, out)
    return out
