"""What the benchmarks of one GPU share: rows of results, and the host's clock."""

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

BYTES_PER_S = 4.24e12
"""Of a device copy on one H200."""

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


def seconds(run: Callable[[], object]) -> float:
    """Of a call, the GPU's work included."""
    torch.cuda.synchronize()
    started = perf_counter()
    run()
    torch.cuda.synchronize()
    return perf_counter() - started
