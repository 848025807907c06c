"""The self-test of Triton's kernels: processes that share its cases, and outlive one that a kernel ends."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch

from braidsdk.kernels.backends import Geometry
from braidsdk.kernels.selftest import CASES, LIMITS, Result, case_bytes

PROCESSES = 8
"""That compile and try kernels at once, at most. Each imports torch and opens the device, and the last case is waited
for by all: more gain little."""

ENDED = "its process ended with"
"""How the trouble of a case begins that gave no result."""


def self_test(
    geometry: Geometry, device: torch.device, *, timed: bool, report: Callable[[int, int], None] | None = None
) -> list[Result]:
    """Try every Triton kernel on a model's shapes, in processes of their own.

    A case that ends its process has failed; the others are tried all the same.

    Args:
        geometry: the model's shapes, and its dtype.
        device: a CUDA device.
        timed: whether to time them too, one after another.
        report: called with the cases done and those to be done, before the first and after each.

    Returns:
        A result for each of `CASES`, in their order.
    """
    command = [sys.executable, "-P", "-m", "braidsdk.kernels.selftest", json.dumps(asdict(geometry))]
    environment = dict(os.environ)
    if device.index:
        visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device.index]
    if not timed:
        command.append("quick")
    results: dict[int, Result] = {}

    def keep(number: int, result: Result) -> None:
        results[number] = result
        if report:
            report(len(results), len(CASES))

    if report:
        report(0, len(CASES))
    processes = 1 if timed else _processes(geometry, device)
    waiting = bytes(range(len(CASES)))
    while waiting:
        taken, waiting, cause = _share(waiting, processes, command, environment, keep)
        for number in taken - results.keys():
            case = CASES[number]
            keep(number, Result(case.op, case.name, None, LIMITS[geometry.torch_dtype], trouble=cause))
    return [results[number] for number in sorted(results)]


def _processes(geometry: Geometry, device: torch.device) -> int:
    """As many as there are cores, and room in the device's memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(PROCESSES, cores, free // case_bytes(geometry)))


def _share(
    cases: bytes,
    processes: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    keep: Callable[[int, Result], None],
) -> tuple[set[int], bytes, str]:
    """Let so many processes take case after case, and keep the results, until no case is left or no process.

    Returns:
        The cases that were taken, those that were not, and how processes ended that did not come to their end. Where
        none took a case, all count as taken.
    """
    numbers, give = os.pipe()
    os.write(give, cases)
    os.close(give)
    lines, tell = os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    with (
        os.fdopen(numbers, "rb", buffering=0) as left,
        os.fdopen(lines, encoding="utf-8", errors="replace") as told,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,  # a pipe unread would fill up
    ):
        try:
            with os.fdopen(tell, "wb") as output:  # then only they have it, and its end is theirs
                for _ in range(min(processes, len(cases))):
                    child = subprocess.Popen(command, env=environment, stdin=left, stdout=output, stderr=errors)
                    children.append(child)
            for line in told:
                if line.startswith("{"):
                    said = json.loads(line)
                    keep(said.pop("number"), Result(**said))
        except BaseException:
            for child in children:
                child.kill()
            raise
        finally:
            ends = {child.wait() for child in children}
        waiting = left.read()
        errors.seek(0)
        cause = f"{ENDED} {', '.join(map(str, sorted(ends - {0})))}: {errors.read().strip()[-300:]}"
    taken = set(cases) - set(waiting)
    return (taken, waiting, cause) if taken else (set(cases), b"", cause)
