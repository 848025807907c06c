"""Instructions of float32 kernels compiled for compute capability 9, where no GPU is needed: JSON by kernel.

A program of its own: in the tests' process Triton interprets. Ends with 77, and the reason on stderr, where Triton
can't compile.
"""

import json
import sys
from dataclasses import replace

import torch


class Driver:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    """Launch attention and a product as a model of head_dim 128 does, but for the launch itself."""
    try:
        import triton
        from triton.backends.nvidia.compiler import get_ptxas_version
        from triton.runtime.jit import JITFunction

        get_ptxas_version(90)
    except Exception as problem:  # no Triton, none for CUDA, or another that keeps its compiler elsewhere
        sys.stderr.write(f"Triton can't compile here: {problem}")
        sys.exit(77)
    from braidsdk.kernels.attention import launch as attention
    from braidsdk.kernels.launch import Tile
    from braidsdk.kernels.paging import PagedSegment, Request
    from braidsdk.kernels.products import products
    from braidsdk.kernels.rope import RotaryTable

    triton.runtime.driver.set_active(Driver())
    counts: dict[str, int] = {}

    def compile_only(function: JITFunction, grid: object) -> object:
        def run(*args: object, **options: object) -> None:
            ptx = function.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
            lines = [line for line in ptx.splitlines() if line.startswith("\t") and line[1:2] not in (".", "/")]
            counts[function.__name__] = max(len(lines), counts.get(function.__name__, 0))

        return run

    JITFunction.__getitem__ = compile_only
    attention.check_tensors = lambda *_: None  # it wants a GPU
    rows, pages = 64, torch.arange(4)
    plain, hidden = PagedSegment(pages, 0, 200, 0), torch.ones(200, dtype=torch.bool)
    for seen in ((plain,), (replace(plain, hidden=hidden, shift=250),)):
        plan = attention.plan_for_triton(
            torch.arange(rows),
            [Request(slice(0, rows), seen)],
            RotaryTable(torch.ones(64), 1.0, torch.float32, torch.device("cpu")),
            limit=256,
            page_size=64,
            group=2,
            kv_heads=2,
        )
        plan.attend(torch.zeros(rows, 4, 128), torch.zeros(2, 4, 2, 64, 128), 1.0)
    products(torch.zeros(rows, 2048), torch.zeros(1024, 2048), 64, Tile(block_n=64, block_k=256, warps=4, stages=2))
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
