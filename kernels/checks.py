"""What an operation checks of its arguments, once, whichever backend computes it."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.backends import Backend, interpreted
from braidsdk.kernels.weight import GROUP, Int8, Rows, Weight

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_shape(op: str, name: str, tensor: Weight, *shape: int) -> None:
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


def check_tensors(op: str, backend: Backend, *tensors: Weight | None) -> None:
    """Refuse tensors that a backend's kernels can't read. torch checks its own.

    Args:
        op: the operation.
        backend: what will compute it.
        tensors: what it reads, activations first; all of one dtype and device but for `Int8` weights.

    Raises:
        RuntimeError: the backend can't run here, or not where the first tensor lies.
        ValueError: tensors of a dtype without kernels, of several dtypes or devices, or not contiguous.
    """
    check = _CHECKS.get(backend)
    if check is None:
        return
    first = next(tensor for tensor in tensors if isinstance(tensor, Tensor))
    check(op, first.dtype, first.device)
    for tensor in tensors:
        if isinstance(tensor, Int8):
            out, size = tensor.shape
            check_shape(op, "scales", tensor.scales, out, -(-size // GROUP))
            check_like(op, tensor.values, torch.int8, first.device)
            check_like(op, tensor.scales, torch.float32, first.device)
        elif isinstance(tensor, Rows):
            if backend != "native":
                raise ValueError(f"{op}: backend={backend!r} needs weights in one piece, got blocks of rows.")
            for part in tensor.parts:
                check_like(op, part, first.dtype, first.device)
        elif tensor is not None:
            check_like(op, tensor, first.dtype, first.device)


def check_like(op: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, name: str = "tensors") -> None:
    """Raise ValueError unless a tensor is contiguous, of this dtype and on this device."""
    if tensor.dtype is not dtype or tensor.device != device or tensor.is_mkldnn or not tensor.is_contiguous():
        layout = tensor.layout if tensor.is_mkldnn else f"strides {list(tensor.stride())}"
        got = f"{tensor.dtype} on {tensor.device}, shape {list(tensor.shape)}, {layout}"
        raise ValueError(f"{op}: expected {name} contiguous, {dtype} on {device}, got {got}.")


def _check_triton(op: str, dtype: torch.dtype, device: torch.device) -> None:
    if find_spec("triton") is None:
        raise RuntimeError(f"{op}: backend='triton' needs the package triton; install it, or pass backend='torch'.")
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(
            f"{op}: backend='triton' needs tensors on a CUDA device, got {device}; pass backend='torch'."
        )
    if dtype not in _TRITON_DTYPES or (dtype == torch.bfloat16 and interpreted()):
        known = "float32 or float16 in Triton's interpreter" if interpreted() else "float32, bfloat16 or float16"
        raise ValueError(f"{op}: backend='triton' needs {known}, got {dtype}; pass backend='torch'.")


def _check_native(op: str, dtype: torch.dtype, device: torch.device) -> None:
    if reason := native.obstacle():
        raise RuntimeError(f"{op}: backend='native' can't run here: {reason}; pass backend='torch'.")
    if dtype != torch.bfloat16 or device.type != "cpu":
        raise ValueError(f"{op}: backend='native' needs bfloat16 on the CPU, got {dtype} on {device}.")


_CHECKS: dict[Backend, Callable[[str, torch.dtype, torch.device], None]] = {
    "native": _check_native,
    "triton": _check_triton,
}
