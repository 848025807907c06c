"""The sanitizers of `.ci/sanitize` see what is wrong in a C kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    "libasan" not in os.environ.get("LD_PRELOAD", ""), reason="this is for .ci/sanitize, which preloads the sanitizers"
)

SUM = """
int sum(const int *in, int count, int shift) {
    int sum = 0;
    for (int i = 0; i < count; i++)
        sum += in[i];
    return sum << shift;
}
"""


@pytest.mark.parametrize(
    ("count", "shift", "said"),
    [
        (1001, 1, r"heap-buffer-overflow(.|\n)*sum\.c:5"),
        (1000, 32, r"sum\.c:6:\d+: runtime error: shift exponent 32 is too large"),
    ],
)
def test_what_is_wrong_in_c_ends_the_process(tmp_path: Path, count: int, shift: int, said: str) -> None:
    source = tmp_path / "sum.c"
    source.write_text(SUM)
    code = f"""
import ctypes, pathlib, torch
from braidsdk.kernels import native
ones = torch.ones(1000, dtype=torch.int32)
kernel, given = native.library(pathlib.Path({str(source)!r})).sum, ctypes.c_void_p(ones.data_ptr())
print(kernel(given, 1000, 1), flush=True)
kernel(given, {count}, {shift})
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "2000\n"
    assert done.returncode
    assert re.search(said, done.stderr)
