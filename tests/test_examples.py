"""Every example runs, from the clone, as a user would start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, store: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, "BRAID_STORE": str(store)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EXPECTED = {
    "quickstart.py": ["Flubarg.", "Plonk.", "0 to compute"],
    "reload.py": ["Troick. ("],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path) -> None:
    for _ in range(2):  # a second run finds the first one's store
        out = run(name, tmp_path)
        assert all(words in out for words in EXPECTED[name]), out
