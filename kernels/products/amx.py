"""The linear operations on a CPU with AMX: checks, and the launch of amx.c."""

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.launch import check_head_norms, check_shape

if TYPE_CHECKING:
    from braidsdk.kernels.norm_qkv.reference import NormQKVWeights

_HEADS, _GATES, _SUMS, _LOGITS = range(4)


class _Arguments(ctypes.Structure):
    """`Arguments` of amx.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "rows", "columns", "outputs")),
        *((name, ctypes.c_void_p) for name in ("x", "norm", "weight", "bias")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("out", "residual", "q_norm", "k_norm", "cos", "sin", "slots", "kv")),
        *((name, ctypes.c_int64) for name in ("pages", "kv_heads", "page_size", "head_dim")),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    )


def norm_qkv_amx(
    hidden: Tensor, weights: "NormQKVWeights", eps: float, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor
) -> Tensor:
    """`norm_qkv` in one pass over the weight."""
    op, (rows, size), (_, pages, kv_heads, page_size, head_dim) = "norm_qkv", hidden.shape, kv.shape
    heads = weights.qkv.shape[0] // head_dim
    _check(op, hidden, weights.norm, weights.qkv, weights.bias, weights.q_norm, weights.k_norm, kv)
    if head_dim % 32 or heads <= 2 * kv_heads:
        got = f"{heads} heads in all, {kv_heads} of keys, of {head_dim}"
        raise ValueError(f"{op}: expected query heads and a head_dim that is a multiple of 32, got {got}.")
    check_shape(op, "norm", weights.norm, size)
    check_shape(op, "qkv", weights.qkv, heads * head_dim, size)
    if weights.bias is not None:
        check_shape(op, "bias", weights.bias, heads * head_dim)
    check_head_norms(op, weights.q_norm, weights.k_norm, head_dim)
    check_shape(op, "slots", slots, rows)
    check_shape(op, "cos", cos, rows, head_dim // 2)
    check_shape(op, "sin", sin, rows, head_dim // 2)
    _check_as(op, torch.float32, cos, sin)
    _check_as(op, torch.int64, slots)
    queries = hidden.new_empty(rows, heads - 2 * kv_heads, head_dim)
    if rows and (largest := _library().braid_largest(slots.data_ptr(), rows)) >= pages * page_size:
        raise IndexError(f"{op}: expected slots below {pages * page_size}, got {largest}.")
    _run(
        kind=_HEADS,
        rows=rows,
        columns=size,
        outputs=heads * head_dim,
        x=hidden,
        norm=weights.norm,
        weight=weights.qkv,
        bias=weights.bias,
        eps=eps,
        out=queries,
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        cos=cos,
        sin=sin,
        slots=slots,
        kv=kv,
        pages=pages,
        kv_heads=kv_heads,
        page_size=page_size,
        head_dim=head_dim,
    )
    return queries


def norm_swiglu_amx(hidden: Tensor, norm: Tensor, gate_up: Tensor, eps: float) -> Tensor:
    """`norm_swiglu` in one pass over the weight, rounded once."""
    op, (rows, size), inner = "norm_swiglu", hidden.shape, len(gate_up) // 2
    _check(op, hidden, norm, gate_up)
    check_shape(op, "norm", norm, size)
    check_shape(op, "gate_up", gate_up, 2 * inner, size)
    out = hidden.new_empty(rows, inner)
    _run(
        kind=_GATES,
        rows=rows,
        columns=size,
        outputs=inner,
        x=hidden,
        norm=norm,
        weight=gate_up,
        eps=eps,
        out=out,
    )
    return out


def out_proj_amx(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`out_proj` in one pass over the weight, rounded once."""
    op, (rows, size), hidden = "out_proj", x.shape, len(weight)
    _check(op, x, weight, bias, residual)
    check_shape(op, "weight", weight, hidden, size)
    check_shape(op, "residual", residual, rows, hidden)
    if bias is not None:
        check_shape(op, "bias", bias, hidden)
    out = torch.empty_like(residual)
    _run(
        kind=_SUMS,
        rows=rows,
        columns=size,
        outputs=hidden,
        x=x,
        weight=weight,
        bias=bias,
        out=out,
        residual=residual,
    )
    return out


def norm_head_amx(hidden: Tensor, norm: Tensor, head: Tensor, eps: float) -> Tensor:
    """`norm_head` in one pass over the weight, not rounded: float32."""
    op, (rows, size), vocab = "norm_head", hidden.shape, len(head)
    _check(op, hidden, norm, head)
    check_shape(op, "norm", norm, size)
    check_shape(op, "head", head, vocab, size)
    out = torch.empty(rows, vocab, dtype=torch.float32, device="cpu")
    _run(
        kind=_LOGITS,
        rows=rows,
        columns=size,
        outputs=vocab,
        x=hidden,
        norm=norm,
        weight=head,
        eps=eps,
        out=out,
    )
    return out


def _check(op: str, *tensors: Tensor | None) -> None:
    """Refuse what amx.c can't read.

    Raises:
        RuntimeError: C kernels can't run here.
        ValueError: tensors that are not contiguous, in bfloat16, on the CPU.
    """
    if reason := native.obstacle():
        raise RuntimeError(f"{op}: path='amx' can't run here: {reason}; pass path='torch'.")
    _check_as(op, torch.bfloat16, *(tensor for tensor in tensors if tensor is not None))


def _check_as(op: str, dtype: torch.dtype, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.is_mkldnn or not (tensor.is_cpu and tensor.is_contiguous()):
            layout = tensor.layout if tensor.is_mkldnn else f"strides {tensor.stride()}"
            got = f"{tensor.dtype} on {tensor.device}, {layout}"
            raise ValueError(f"{op}: path='amx' needs contiguous tensors of {dtype} on the CPU, got {got}.")


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")

_free: list[Tensor] = []
"""Scratch memory that no call uses: as many pieces as calls ever ran at once."""


def _run(**given: Any) -> None:
    """Compute products on all threads; tensors are given by their addresses."""
    if not given["rows"]:
        return
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in given.items()}
    arguments = _Arguments(**values)
    threads = torch.get_num_threads()
    c = _library()
    arguments.scratch_bytes = c.braid_scratch_bytes(ctypes.byref(arguments))
    size = threads * arguments.scratch_bytes
    scratch = _free.pop() if _free else _NOTHING  # one pop, one thread: lists see to that
    if len(scratch) < size:
        scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    arguments.scratch = scratch.data_ptr()
    native.parallel(c.braid_products, arguments, threads)
    _free.append(scratch)


@cache
def _library() -> ctypes.CDLL:
    c = native.library(Path(__file__).with_name("amx.c"))
    c.braid_scratch_bytes.argtypes = [ctypes.POINTER(_Arguments)]
    c.braid_scratch_bytes.restype = ctypes.c_int64
    c.braid_largest.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    c.braid_largest.restype = ctypes.c_int64
    return c
