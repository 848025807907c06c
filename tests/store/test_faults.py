"""One fault at every single step of what a store does; see `campaign/steps.py`. A part runs always, all of it by
`pytest -m campaign`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).parent / "campaign"
COMPILER = shutil.which("cc")

KINDS = {
    "kill": "SIGKILL at one step",
    "kill, then kill the recovery": "SIGKILL at one step, then SIGKILL while the store is opened again",
    "eio": "EIO at one step",
    "enospc": "ENOSPC at one step that writes",
    "lock": "ENOLCK at one step that locks",
    "eintr": "EINTR at one step that locks",
}
"""The table's name of each kind of fault."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler, to fail calls to the system"
)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(CAMPAIGN / "faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def run(faults: Path, *arguments: str) -> Any:
    command = [sys.executable, str(CAMPAIGN / "steps.py"), *arguments]
    environment = {**os.environ, "LD_PRELOAD": str(faults)}
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)


def test_a_fault_at_any_step_loses_nothing_and_is_typed(faults: Path) -> None:
    found = run(faults, "--every", "29")
    assert found["wrong"] == []
    assert found["counts"]["kill"] >= 15
    assert found["counts"]["eio, errors"] >= 10, "most faults must be noticed"


@pytest.mark.campaign
def test_a_fault_at_every_step_loses_nothing_and_is_typed(faults: Path, counted: Callable[..., None]) -> None:
    found = run(faults)
    for what, name in KINDS.items():
        kind, then, _ = what.partition(", then")
        wrong = sum(each.startswith(f"{kind} at ") and (", then at" in each) == bool(then) for each in found["wrong"])
        counted(name, found["counts"][what], wrong=wrong)
    assert found["wrong"] == []
    assert found["counts"]["kill"] >= 200


@pytest.mark.campaign
def test_the_campaign_sees_a_row_that_is_written_before_its_file(faults: Path) -> None:
    assert run(faults, "--kinds", "kill", "--planted", "row-first")["wrong"], "it went unseen"
