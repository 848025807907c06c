"""Seconds until a process is ready: to import, to open a Braid, its kernels' self-test included, and to warm it up.

`gpu.py` starts it twice, each time with caches that were empty before the first: Triton's and our own.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter

PROCESSES = ("first process", "second process")


def processes(checkpoint: Path, scratch: Path | None) -> Iterator[dict[str, object]]:
    """A row per process. Call it while this one holds little of the GPU's memory.

    Raises:
        SystemExit: one failed, or left some operation to torch.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as caches:
        folders = {"TRITON_CACHE_DIR": f"{caches}/triton", "XDG_CACHE_HOME": f"{caches}/user"}
        command = [sys.executable, __file__, str(checkpoint), f"{caches}/store"]
        for process in PROCESSES:
            child = subprocess.run(command, env={**os.environ, **folders}, capture_output=True, text=True, check=False)
            if child.returncode:
                raise SystemExit(f"warming up, {process}: {child.stderr[-2000:]}")
            yield {"process": process, **json.loads(child.stdout.splitlines()[-1])}


def main(checkpoint: str, store: str) -> None:
    """Print the seconds of each step as a line of JSON."""
    marks = [perf_counter()]
    import torch

    from braidsdk import Braid
    from braidsdk.engine.kernel_choice import KernelsWarning

    warnings.simplefilter("error", KernelsWarning)
    marks.append(perf_counter())
    with Braid(checkpoint, store=store, device="cuda", dtype="bfloat16", kernels="auto") as braid:
        marks.append(perf_counter())
        for requests in (1, 64):
            braid.warm_up(requests=requests, progress=False)
            torch.cuda.synchronize()
            marks.append(perf_counter())
    steps = [later - earlier for earlier, later in pairwise(marks)]
    names = ("import_s", "open_s", "warm_up_s", "warm_up_64_s")
    sys.stdout.write(json.dumps(dict(zip(names, steps, strict=True))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
