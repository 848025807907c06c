"""What Triton makes of kernels in float32, compiled for a GPU that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST = 4000
"""Instructions of one kernel. From about twice as many on, ptxas leaves a thread 32 registers, spills kilobytes, and
takes many times as long."""


def test_float32_kernels_stay_short(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("instructions.py"))]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if child.returncode == 77:
        pytest.skip(child.stderr)
    assert child.returncode == 0, child.stderr
    counts = json.loads(child.stdout)
    assert {"cascade", "products_kernel"} <= set(counts)
    assert {name: count for name, count in counts.items() if count > MOST} == {}
