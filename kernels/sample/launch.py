"""The choice of a token from its logits by Triton: the launches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from braidsdk.kernels.checks import check_tensors
from braidsdk.kernels.launch import counters, launch_options
from braidsdk.kernels.sample.reference import Choices

_CHUNK, _BLOCK = 64, 64
"""Tokens of a chunk; chunks of a program of `scan` and `draw`."""

_LISTED, _PIVOTS, _WARPS = 32, 4, 16
"""Of `bound`: chunks that a search looks at together, parts that it cuts its range into, and warps."""


@dataclass(frozen=True)
class Bounds:
    """What `draw` needs of a batch's logits, and who takes part in it; see the kernels."""

    maxima: Tensor
    tops: Tensor
    bounds: Tensor


def sample_triton(logits: Tensor, choices: Choices, out: Tensor) -> None:
    """What `op.sample` computes, without a host synchronisation; mass is summed in units of 2^-40 of the likeliest
    token's.
    """
    rows, vocab = logits.shape
    device = logits.device
    if rows:
        found = find_bounds(logits, choices)
        from braidsdk.kernels.sample import kernel

        parts = -(-vocab // (_CHUNK * _BLOCK))
        kernel.draw[(parts, rows)](
            logits,
            choices.shape,
            choices.draws,
            choices.seen.view(torch.uint8),
            found.maxima,
            found.tops,
            found.bounds,
            torch.empty(rows, parts, dtype=torch.float32, device=device),
            torch.empty(rows, parts, dtype=torch.int32, device=device),
            counters("sample", device, rows),
            out,
            out.stride(0),
            rows,
            vocab,
            _CHUNK,
            -(-vocab // _CHUNK),
            _BLOCK,
            parts,
            _block(parts),
            num_warps=8,
            **launch_options(device),
        )


def find_bounds(logits: Tensor, choices: Choices) -> Bounds:
    """From where on tokens are kept, by Triton: the first two of the three kernels. Arguments as in `sample`."""
    from braidsdk.kernels.sample import kernel

    check_tensors("sample", "triton", logits)
    for tensor in (choices.shape, choices.draws, choices.seen):
        if tensor.device != logits.device or not tensor.is_contiguous():
            raise ValueError(f"sample: expected contiguous choices on {logits.device}, got them on {tensor.device}.")
    (rows, vocab), device = logits.shape, logits.device
    chunks, parts = -(-vocab // _CHUNK), -(-vocab // (_CHUNK * _BLOCK))
    # Each by itself, so that all are aligned: parts of one tensor are or are not, and each case is compiled anew.
    maxima, sums = (torch.empty(rows, chunks, dtype=torch.float32, device=device) for _ in range(2))
    top_ids, finite = (torch.empty(rows, parts, dtype=torch.int32, device=device) for _ in range(2))
    seen = choices.seen.view(torch.uint8)
    options = launch_options(device)
    kernel.scan[(parts, rows)](
        logits,
        choices.shape,
        seen,
        maxima,
        sums,
        top_ids,
        finite,
        rows,
        vocab,
        _CHUNK,
        chunks,
        _BLOCK,
        parts,
        num_warps=8,
        **options,
    )
    tops = torch.empty(rows, dtype=torch.float32, device=device)
    bounds = torch.empty(4, rows, dtype=torch.int32, device=device)
    kernel.bound[(rows,)](
        logits,
        choices.shape,
        choices.draws,
        seen,
        maxima,
        sums,
        top_ids,
        finite,
        torch.empty(rows, chunks, dtype=torch.int32, device=device),
        tops,
        bounds,
        rows,
        vocab,
        _CHUNK,
        chunks,
        _block(chunks),
        _LISTED,
        parts,
        _block(parts),
        _PIVOTS,
        num_warps=_WARPS,
        **options,
    )
    return Bounds(maxima, tops, bounds)


def _block(number: int) -> int:
    """The least from 16 on that holds `number`: a block that Triton takes."""
    return max(16, 1 << (number - 1).bit_length())
