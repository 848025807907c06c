"""Final norm, LM head and greedy choice: the contracts, their checks, and what computes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_like, check_shape, check_tensors
from braidsdk.kernels.head.eager import norm_head_torch
from braidsdk.kernels.head.launch import greedy_triton, norm_head_triton
from braidsdk.kernels.head.native import norm_head_native
from braidsdk.kernels.head.reference import greedy_reference
from braidsdk.kernels.measure import measured
from braidsdk.kernels.weight import Weight

BACKENDS: dict[Backend, Callable[..., Tensor]] = {
    "torch": norm_head_torch,
    "native": norm_head_native,
    "triton": norm_head_triton,
}

GREEDY: dict[Backend, Callable[[Tensor, Tensor], None]] = {
    "torch": greedy_reference,
    "triton": greedy_triton,
}


@measured("head")
def norm_head(hidden: Tensor, norm: Tensor, head: Weight, eps: float, *, backend: Backend = "torch") -> Tensor:
    """Logits of hidden states; by all backends but torch summed in float32 and never rounded to a narrower dtype.

    Args:
        hidden: [rows, hidden].
        norm: weights of the final norm, [hidden].
        head: [vocab_size, hidden].
        eps: of the norm.
        backend: what computes it; none falls back to another. Triton takes contiguous tensors in float32, bfloat16 or
            float16; "native" contiguous ones in bfloat16 on the CPU.

    Returns:
        [rows, vocab_size], float32 (float64 for float64 inputs, which only torch takes).

    Raises:
        RuntimeError: the backend can't run here.
        ValueError: shapes, dtypes or strides are not as above.
    """
    op, size = "norm_head", hidden.shape[1]
    check_tensors(op, backend, hidden, norm, head)
    check_shape(op, "norm", norm, size)
    check_shape(op, "head", head, head.shape[0], size)
    return BACKENDS[backend](hidden, norm, head, eps)


def greedy(logits: Tensor, *, out: Tensor | None = None, backend: Backend = "torch") -> Tensor:
    """The likeliest token of each row, the lowest id among equals. No backend synchronises with the host.

    Args:
        logits: [rows, vocab_size]; for Triton contiguous, float32.
        out: takes the result; its rows may lie apart. Without it, the result is a new tensor.
        backend: "torch" or "triton"; neither falls back to the other.

    Returns:
        Ids, and 1 where all of a row is finite, else 0; int64 [2, rows]. The id of a row that is not means nothing, but
        lies within the vocabulary.

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: `out` is not as the result, or Triton was asked for, and the logits are not as above.
    """
    check_tensors("greedy", backend, logits)
    if backend == "triton" and logits.dtype != torch.float32:
        raise ValueError(f"greedy: backend='triton' needs float32, got {logits.dtype}; pass backend='torch'.")
    if out is None:
        out = torch.empty(2, len(logits), dtype=torch.int64, device=logits.device)
    check_shape("greedy", "out", out, 2, len(logits))
    check_like("greedy", out[0], torch.int64, logits.device, "out")
    GREEDY[backend](logits, out)
    return out
