"""The beginning and the end of a step: the contracts, their checks, and what computes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.checks import check_like, check_shape, check_tensors
from braidsdk.kernels.step.launch import begin_step_triton, end_step_triton
from braidsdk.kernels.step.reference import begin_step_reference, end_step_reference

BACKENDS: dict[Backend, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "torch": begin_step_reference,
    "triton": begin_step_triton,
}

END: dict[Backend, Callable[[Tensor], None]] = {
    "torch": end_step_reference,
    "triton": end_step_triton,
}


def begin_step(
    token_ids: Tensor,
    frames: Tensor,
    slots: Tensor,
    embedding: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look up what the first layer reads of each token.

    Args:
        token_ids: int64 [tokens], below vocab_size. Triton does not see whether they are, nor whether positions lie
            within their tables.
        frames: positions in each token's segment, int64 [tokens]. A negative one is that of a row that holds nothing:
            it is rotated as position 0, and its slot is -1 if it is looked up.
        slots: where each token's key and value go, int64 [tokens]; or where those of each position of its segment go,
            int64 [tokens, window], to be looked up.
        embedding: [vocab_size, hidden]; for Triton contiguous, in float32, bfloat16 or float16.
        cos, sin: of every position, float32 [positions, head_dim / 2] (float64 for a float64 embedding, which only
            torch takes).
        backend: "torch" or "triton"; neither falls back to the other.

    Returns:
        Hidden states [tokens, hidden], cosines and sines [tokens, head_dim / 2], and slots, int64 [tokens].

    Raises:
        RuntimeError: Triton can't run here.
        ValueError: shapes, dtypes or strides are not as above.
    """
    op, tokens = "begin_step", len(token_ids)
    check_tensors(op, backend, embedding)
    check_shape(op, "frames", frames, tokens)
    check_shape(op, "slots", slots, tokens, *slots.shape[1:2])
    check_shape(op, "sin", sin, *cos.shape)
    angles = torch.promote_types(embedding.dtype, torch.float32)
    for name, tensor, dtype in (
        ("token_ids", token_ids, torch.int64),
        ("frames", frames, torch.int64),
        ("slots", slots, torch.int64),
        ("cos", cos, angles),
        ("sin", sin, angles),
    ):
        check_like(op, tensor, dtype, embedding.device, name)
    return BACKENDS[backend](token_ids, frames, slots, embedding, cos, sin)


def end_step(state: Tensor, *, backend: Backend = "torch") -> None:
    """Move rows on by one token, once nothing reads where they were.

    Args:
        state: of each row the absolute position and the position in its segment, int64 [2, rows], changed in place; the
            lines may lie apart. A row with a negative position in its segment holds nothing, and stays.
        backend: "torch" or "triton"; neither falls back to the other.

    Raises:
        ValueError: it is not of that shape or dtype.
    """
    check_shape("end_step", "state", state, 2, *state.shape[1:])
    check_like("end_step", state[0], torch.int64, state.device, "state")
    END[backend](state)
