"""The linear operations on a CPU: the launch of native.c."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.weight import Int8, Rows, Weight

HEADS, GATES, SUMS, LOGITS = range(4)
"""What a call computes: `norm_qkv`, `norm_swiglu`, `out_proj`, `norm_head`."""


class _Block(ctypes.Structure):
    """`Block` of native.c: rows of a weight, in bfloat16, or in int8 with scales."""

    _fields_ = (("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("rows", ctypes.c_int64))


class _Arguments(ctypes.Structure):
    """`Arguments` of native.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "rows", "columns", "outputs")),
        *((name, ctypes.c_void_p) for name in ("x", "norm")),
        ("weight", _Block * 3),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("out", "residual", "q_norm", "k_norm", "cos", "sin", "slots", "kv")),
        *((name, ctypes.c_int64) for name in ("pages", "kv_heads", "page_size", "head_dim")),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    )


def largest(slots: Tensor) -> int:
    """The largest of some slots, int64 [rows], at least one."""
    found: int = _library().braid_largest(slots.data_ptr(), len(slots))
    return found


def _blocks(weight: Weight) -> "ctypes.Array[_Block]":
    """A weight as native.c takes it: up to three blocks of rows, one below another."""
    if isinstance(weight, Int8):
        blocks = [_Block(weight.values.data_ptr(), weight.scales.data_ptr(), weight.shape[0])]
    else:
        parts = weight.parts if isinstance(weight, Rows) else (weight,)
        blocks = [_Block(part.data_ptr(), None, part.shape[0]) for part in parts]
    return (_Block * 3)(*blocks)


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")

_free: list[Tensor] = []
"""Scratch memory that no call uses: as many pieces as calls ever ran at once."""


def run(**given: Any) -> None:
    """Compute products on all threads.

    Args:
        given: fields of `_Arguments`, tensors for pointers and a `Weight`. They are checked before: contiguous,
            bfloat16, on the CPU.
    """
    if not given["rows"]:
        return
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in given.items()}
    values["weight"] = _blocks(given["weight"])
    arguments = _Arguments(**values)
    threads = torch.get_num_threads()
    c = _library()
    arguments.scratch_bytes = c.braid_scratch_bytes(ctypes.byref(arguments))
    size = threads * arguments.scratch_bytes
    try:
        scratch = _free.pop()  # one pop, one thread: lists see to that
    except IndexError:
        scratch = _NOTHING
    if scratch.shape[0] < size:
        scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    arguments.scratch = scratch.data_ptr()
    native.parallel(c.braid_products, arguments, threads)
    _free.append(scratch)


@cache
def _library() -> ctypes.CDLL:
    c = native.library(Path(__file__).with_name("native.c"))
    c.braid_scratch_bytes.argtypes = [ctypes.POINTER(_Arguments)]
    c.braid_scratch_bytes.restype = ctypes.c_int64
    c.braid_largest.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    c.braid_largest.restype = ctypes.c_int64
    return c
