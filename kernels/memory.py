"""Memory for tensors that are read from end to end again and again."""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 1 << 21


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; what is large lies in huge pages on a CPU where Linux has them, and is read faster there.

    Raises:
        RuntimeError: there is not so much memory.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise RuntimeError(f"{nbytes} bytes can't be allocated: {error}") from error
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
