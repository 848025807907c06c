"""What Triton made of the kernels that ran in this process."""

import gc

from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction


def compiled_kernels() -> list[dict[str, object]]:
    """A row per compiled kernel: its constants, 32-bit registers a thread, how many of them were spilled, and bytes of
    shared memory."""
    functions = [each for each in gc.get_objects() if issubclass(type(each), JITFunction)]
    caches = [cache for function in functions for cache, *_ in function.device_caches.values()]
    rows = [_row(kernel) for cache in caches for kernel in cache.values() if kernel.module is not None]
    return sorted(rows, key=lambda row: [str(value) for value in row.values()])


def _row(kernel: CompiledKernel) -> dict[str, object]:
    names = kernel.src.fn.arg_names
    constants = {names[at]: value for (at, *_), value in kernel.src.constants.items() if names[at].isupper()}
    return {
        "kernel": kernel.metadata.name,
        "constants": constants,
        "warps": kernel.metadata.num_warps,
        "registers": kernel.n_regs,
        "spilled": kernel.n_spills,
        "shared_bytes": kernel.metadata.shared,
    }
