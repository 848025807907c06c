"""`--verbose-kernels`: a table of the model's operations on stderr, when the process ends."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from braidsdk.engine.verbose import table
from braidsdk.kernels.measure import Total

CAPITAL = "What is the capital of Aistonia?"
LAYERS = 6  # of braid-tiny


def calls(stderr: str) -> dict[str, int]:
    """Calls by operation, from the table; it is all that `-q` leaves on stderr."""
    rows = [line.split() for line in stderr.splitlines()]
    assert " ".join(rows[0]) == "operation path calls ms in all us a call MB a call GB/s"
    assert all(row[1] == "torch" for row in rows[1:6])
    return {row[0]: int(row[2].replace(",", "")) for row in rows[1:6]}


def test_the_table_says_how_often_each_operation_ran(child: Callable[..., subprocess.Popen]) -> None:
    out, err = child("ask", CAPITAL, "-q", "-n", "3", "--verbose-kernels").communicate()
    assert len(out.splitlines()) == 1
    found = calls(err)
    assert 1 <= found["head"] <= 3
    assert found["norm_qkv"] in [LAYERS * (found["head"] + prepared) for prepared in (0, 1)]
    assert found["attention"] >= LAYERS * found["head"], "a pass without logits ends with the last layer's keys"
    assert found["out_proj"] == 2 * found["attention"] == 2 * found["swiglu"]


def test_the_variable_does_it_too_and_reaches_the_python_api(
    child: Callable[..., subprocess.Popen], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BRAID_VERBOSE_KERNELS", "1")
    _, err = child("add", "--system", "rules.txt", "-q").communicate()
    assert "swiglu" in err
    listed = child("ls", "-q").communicate()[1]
    assert listed == "", "nothing is computed there"
    code = (
        f"from braidsdk import Braid; Braid('braid-tiny', device='cpu').ask({CAPITAL!r}, chunks=[], max_new_tokens=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert calls(done.stderr)["head"] == 1


def test_without_it_nothing_is_shown(child: Callable[..., subprocess.Popen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_VERBOSE_KERNELS", "0")
    assert child("ask", CAPITAL, "-q", "-n", "1").communicate()[1] == ""


def test_rates_are_of_what_was_timed() -> None:
    totals = {
        ("attention", "triton"): Total(calls=4, timed=2, seconds=2e-6, bytes=4_000_000),
        ("head", "torch"): Total(calls=1, timed=0, seconds=0.0, bytes=1_000),
    }
    _, attention, head, untimed, *_ = table(totals).splitlines()
    assert attention.split() == ["attention", "triton", "4", "0.0", "1.0", "1.00", "1,000.0"]
    assert head.split() == ["head", "torch", "1", "-", "-", "0.00", "-"]
    assert untimed.startswith("3 calls were launched too slowly")
