"""Where Triton kernels can run, and how they are launched. Does not import triton itself."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

Path = Literal["triton", "amx", "torch"]
"""Which implementation an operation takes: Triton kernels, C kernels for CPUs with AMX, or its torch reference."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """How a kernel over a few rows cuts its weight.

    Attributes:
        block_n: rows of the weight that one program owns.
        block_k: columns that one load takes, for 16-bit numbers; half as many for float32.
        warps: per program.
        stages: how many such loads are in flight.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int

    def columns(self, x: Tensor) -> int:
        """`block_k` for `x` [rows, size]: no wider than its rows need."""
        fitting = max(16, 1 << (x.shape[1] - 1).bit_length())
        return min(self.block_k * 2 // x.itemsize, fitting)


MATRIX_ROWS = 16
"""From so many rows a program on, products take matrix instructions."""

Tiles = dict[int, dict[int, Tile]]
"""By the weight's columns, then by the rows that one program takes."""


def tile_for(tiles: Tiles, rows: int, columns: int) -> tuple[int, Tile]:
    """The rows that one program takes, and its shape.

    Of the table's columns the fewest that are not fewer than these, else the most; the same for rows, where several
    programs share what is beyond the most.
    """
    by_rows = tiles[min((size for size in tiles if size >= columns), default=max(tiles))]
    block_rows = min((size for size in by_rows if size >= rows), default=max(by_rows))
    return block_rows, by_rows[block_rows]


def padded(head_dim: int) -> int:
    """The power of two that device code takes for a head: it masks what lies beyond `head_dim`."""
    return 1 << (head_dim - 1).bit_length()


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_triton(op: str, *tensors: Tensor | None) -> None:
    """Refuse what the Triton kernels of `op` can't run on.

    Raises:
        RuntimeError: there is no Triton here, or no CUDA device under the tensors.
        ValueError: tensors of several dtypes or devices, of a dtype without kernels, or not contiguous.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device, dtype = given[0].device, given[0].dtype
    if find_spec("triton") is None:
        raise RuntimeError(f"{op}: path='triton' needs the package triton; install it, or pass path='torch'.")
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(f"{op}: path='triton' needs tensors on a CUDA device, got {device}; pass path='torch'.")
    if dtype not in _DTYPES or (dtype == torch.bfloat16 and interpreted()):
        known = "float32 or float16 in Triton's interpreter" if interpreted() else "float32, bfloat16 or float16"
        raise ValueError(f"{op}: path='triton' needs {known}, got {dtype}; pass path='torch'.")
    for tensor in given:
        if tensor.dtype != dtype or tensor.device != device:
            got = f"{tensor.dtype} on {tensor.device} beside {dtype} on {device}"
            raise ValueError(f"{op}: expected tensors of one dtype on one device, got {got}.")
        if not tensor.is_contiguous():
            shape, strides = list(tensor.shape), list(tensor.stride())
            raise ValueError(f"{op}: expected contiguous tensors, got strides {strides} for shape {shape}.")


def check_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless `tensor`, the argument `name` of `op`, has that shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}.")


def check_head_norms(op: str, q_norm: Tensor | None, k_norm: Tensor | None, head_dim: int) -> None:
    """Raise ValueError unless the QK norms of `op` are both of shape [head_dim], or both None."""
    if (q_norm is None) != (k_norm is None):
        given = "k_norm" if q_norm is None else "q_norm"
        raise ValueError(f"{op}: expected both q_norm and k_norm or neither, got {given} alone; pass the other, too.")
    if q_norm is not None and k_norm is not None:
        check_shape(op, "q_norm", q_norm, head_dim)
        check_shape(op, "k_norm", k_norm, head_dim)


@cache
def dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for every launch: programmatic dependent launch (PDL) where the device has it.

    A kernel launched so may begin while the one before it still runs. It reads nothing but weights, and writes
    nothing, before it has waited for that one to end. So a weight must not be written by any kernel later than the
    last but one before its first use; a model's weights are on the device long before.
    """
    return {"USE_PDL": True, "launch_pdl": True} if dependent_launch(device) else {"USE_PDL": False}


_counters: dict[tuple[str, torch.device], Tensor] = {}


def counters(op: str, device: torch.device, size: int) -> Tensor:
    """At least `size` zeroed arrival counters, int32, kept for `op` on `device`; kernels leave them zeroed.

    Launches of one operation share them, so they must follow one another on one stream. Call an operation once before
    its launch is captured in a CUDA graph: a graph must not own the counters.
    """
    kept = _counters.get((op, device))
    if kept is None or len(kept) < size:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: run it once with as many rows before capturing it in a CUDA graph.")
        kept = _counters[op, device] = torch.zeros(max(size, 4096), dtype=torch.int32, device=device)
    return kept
