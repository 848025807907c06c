"""One fault at every single step of what a store does; see `campaign/steps.py`. A part runs always, all of it by
`pytest -m campaign`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

KINDS = {
    "kill": "SIGKILL at one step",
    "kill, then kill the recovery": "SIGKILL at one step, then SIGKILL while the store is opened again",
    "eio": "EIO at one step",
    "enospc": "ENOSPC at one step that writes",
    "lock": "ENOLCK at one step that locks",
    "eintr": "EINTR at one step that locks",
}
"""The table's name of each kind of fault."""


@pytest.fixture
def steps(campaign: Callable[..., Any]) -> Callable[..., Any]:
    return partial(campaign, "steps.py", preload="faults.c")


def test_a_fault_at_any_step_loses_nothing_and_is_typed(steps: Callable[..., Any]) -> None:
    found = steps("--every", "53")
    assert found["wrong"] == []
    assert found["counts"]["kill"] >= 10
    assert found["counts"]["eio, errors"] >= 7, "most faults must be noticed"


@pytest.mark.campaign
def test_a_fault_at_every_step_loses_nothing_and_is_typed(
    steps: Callable[..., Any], counted: Callable[..., None]
) -> None:
    found = steps()
    for what, name in KINDS.items():
        kind, then, _ = what.partition(", then")
        wrong = sum(each.startswith(f"{kind} at ") and (", then at" in each) == bool(then) for each in found["wrong"])
        counted(name, found["counts"][what], wrong=wrong)
    assert found["wrong"] == []
    assert found["counts"]["kill"] >= 200


def test_kills_see_a_row_that_is_written_before_its_file(steps: Callable[..., Any]) -> None:
    assert steps("--kinds", "kill", "--planted", "row-first", "--every", "9")["wrong"], "it went unseen"
