"""Choosing tokens on one GPU: microseconds, in a CUDA graph, by how they are chosen.

    python benchmarks/kernels/sample.py --out sample.json

Logits are random, a few hundred of them likely; `flat` has none that stand out.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from braidsdk.kernels.head import greedy
from braidsdk.kernels.sample import Choices, sample

VOCAB, COPIES, LIKELY = 151_936, 4, 400
DEVICE = torch.device("cuda")
CASES: dict[str, dict[str, float]] = {
    "temperature alone": {"temperature": 1.0},
    "top_k 20": {"temperature": 0.6, "top_k": 20},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top_k 50, top_p 0.95": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    "top_k 1,000": {"temperature": 1.0, "top_k": 1000},
    "top_p 0.95 alone, flat": {"temperature": 1.0, "top_p": 0.95},
}


def logits(rows: int, *, flat: bool) -> Tensor:
    """[copies, rows, vocab]"""
    if flat:
        return torch.randn(COPIES, rows, VOCAB, device=DEVICE)
    found = torch.randn(COPIES, rows, VOCAB, device=DEVICE) * 2.2
    likely = torch.randint(0, VOCAB, (COPIES, rows, LIKELY), device=DEVICE)
    ranks = torch.arange(1, LIKELY + 1, device=DEVICE)
    return found.scatter_(2, likely, 12 - 2.2 * ranks.log() + torch.randn(likely.shape, device=DEVICE))


def timed(run: Callable[[int], object]) -> float:
    """Microseconds a call."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)
        with torch.cuda.graph(graph, stream=stream):
            for copy in range(COPIES):
                run(copy)
    torch.cuda.synchronize()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / COPIES)
    return statistics.median(times)


@torch.inference_mode()
def measure(rows: int) -> dict[str, float]:
    """By case; that everything drawn may be drawn is the tests' business."""
    peaked, flat = logits(rows, flat=False), logits(rows, flat=True)
    found = {"greedy": timed(lambda copy: greedy(peaked[copy], backend="triton"))}
    for name, case in CASES.items():
        choices = Choices.greedy(torch.zeros(rows, VOCAB, dtype=torch.bool, device=DEVICE))
        choices.shape[0], choices.shape[1] = case["temperature"], case.get("top_p", 1.0)
        choices.draws[0], choices.draws[1] = int(case.get("top_k", 0)), torch.arange(rows)
        given = flat if name.endswith("flat") else peaked

        def run(copy: int, given: Tensor = given, choices: Choices = choices) -> object:
            return sample(given[copy], choices, backend="triton")

        found[name] = timed(run)
    return {name: round(us, 1) for name, us in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = {
        "command": "python benchmarks/kernels/sample.py",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vocab": VOCAB,
        "us": {str(rows): measure(rows) for rows in (1, 64)},
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
