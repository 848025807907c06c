"""The choice of a token from its logits: checks, and which implementation runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from braidsdk.kernels.launch import Path, check_shape, check_triton, counters, launch_options
from braidsdk.kernels.sample.reference import sample_reference

_CHUNK, _BLOCK = 64, 64
"""Tokens of a chunk; chunks of a program of `scan` and `draw`."""

_LISTED, _PIVOTS, _WARPS = 32, 4, 16
"""Of `bound`: chunks that a search looks at together, parts that it cuts its range into, and warps."""


@dataclass(frozen=True)
class Choices:
    """How each row's token is chosen; read, and counted on, on the device.

    Attributes:
        shape: temperature (0 takes the likeliest), top_p (1 keeps all), min_p (0 keeps all), repetition penalty (1 is
            none); float64 [4, rows].
        draws: top_k (0 keeps all), seed, and which of the request's tokens this is; int64 [3, rows]. The last is
            counted on by each choice.
        seen: ids that the repetition penalty counts as said, bool [rows, vocab_size]; where there is a penalty, what is
            chosen is marked in it.
    """

    shape: Tensor
    draws: Tensor
    seen: Tensor

    @classmethod
    def greedy(cls, seen: Tensor) -> "Choices":
        """The likeliest of each row of `seen`, without a penalty."""
        rows, device = len(seen), seen.device
        shape = torch.zeros(4, rows, dtype=torch.float64, device=device)
        shape[1] = shape[3] = 1.0
        return cls(shape, torch.zeros(3, rows, dtype=torch.int64, device=device), seen)


@dataclass(frozen=True)
class Bounds:
    """What `draw` needs of a batch's logits, and who takes part in it; see the kernels."""

    maxima: Tensor
    tops: Tensor
    bounds: Tensor


def sample(logits: Tensor, choices: Choices, *, path: Path = "torch") -> tuple[Tensor, Tensor]:
    """Choose a token per row, each row in its own way. Neither path's random numbers depend on the batch.

    Repetition penalty, temperature, top_k, top_p, min_p, in this order, as in transformers. Tokens equal to the last
    that top_k keeps are kept too; of tokens equal to the last that top_p needs, as many as it needs, the highest ids
    first. A greedy row gives the likeliest, the lowest id among equals. Triton's path does not synchronise with the
    host; it sums mass in units of 2^-40 of the likeliest token's.

    Args:
        logits: float32 [rows, vocab_size]; contiguous for Triton.
        choices: of these rows; changed as told there.
        path: which implementation; neither falls back to the other. Both draw the same tokens but for rounding.

    Returns:
        Ids, int64 [rows], and whether all of a row is finite, bool [rows]. The id of a row that is not means nothing,
        but lies within the vocabulary.

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
    if path == "torch":
        return sample_reference(logits, choices.shape, choices.draws, choices.seen)
    device = logits.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
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
            ids,
            finite,
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
    return ids, finite


def find_bounds(logits: Tensor, choices: Choices) -> Bounds:
    """From where on tokens are kept, by Triton: the first two of the three kernels. Arguments as in `sample`."""
    from braidsdk.kernels.sample import kernel

    check_triton("sample", logits)
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
