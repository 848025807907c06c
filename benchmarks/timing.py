"""What the benchmarks of one GPU share: rows of results, and the host's clock."""

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

Row = dict[str, Any]


def spread(values: list[float], unit: str) -> Row:
    """Median, least and greatest."""
    return {
        "value": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "unit": unit,
        "runs": len(values),
    }


def copy_bytes_per_s(gib: int = 4, runs: int = 10) -> float:
    """Bandwidth of this GPU's memory: the best of several device copies of `gib` GiB, bytes read and written."""
    source = torch.ones(gib << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(runs))
    return 2 * source.nbytes / best


def seconds(run: Callable[[], object]) -> float:
    """Of a call, the GPU's work included."""
    torch.cuda.synchronize()
    started = perf_counter()
    run()
    torch.cuda.synchronize()
    return perf_counter() - started
