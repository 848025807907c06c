"""One fault at every single step of what a store does; see `campaign/steps.py`. A part runs always, all of it by
`pytest -m campaign`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).parent / "campaign"
COMPILER = shutil.which("cc")

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
def test_a_fault_at_every_step_loses_nothing_and_is_typed(faults: Path) -> None:
    found = run(faults)
    sys.stdout.write(json.dumps(found["counts"]))
    assert found["wrong"] == []
    assert found["counts"]["kill"] >= 200


@pytest.mark.campaign
def test_the_campaign_sees_a_row_that_is_written_before_its_file(faults: Path) -> None:
    assert run(faults, "--kinds", "kill", "--planted", "row-first")["wrong"], "it went unseen"
