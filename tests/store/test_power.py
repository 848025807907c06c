"""Power cuts, remade from a record of what was written and synced; see `campaign/power.py`. A part runs always, all of
it by `pytest -m campaign`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

TAKEN_OUT = {
    "no-file-sync": "an entry's file is not synced",
    "no-folder-sync": "no folder is synced",
    "no-digest": "an entry's digest is not compared",
    "no-sync-after-commit": "SQLite does not sync the folder after a commit",
}
"""Precautions that the store needs, and that the replay must miss. `test_faults.py` has one more: the row is last."""


@pytest.fixture
def cuts(campaign: Callable[..., Any]) -> Callable[..., Any]:
    return partial(campaign, "power.py", preload="recorder.c")


def test_after_a_power_cut_what_was_acknowledged_is_there(cuts: Callable[..., Any]) -> None:
    found = cuts("--workloads", "4", "--states", "20")
    assert found["wrong"] == []
    assert found["counts"]["states"] == 80
    assert found["counts"]["killed processes"] >= 3


@pytest.mark.parametrize("what", TAKEN_OUT)
def test_power_cuts_see_that_a_precaution_is_missing(cuts: Callable[..., Any], what: str) -> None:
    assert cuts("--workloads", "2", "--states", "15", "--seed", "10", "--planted", what)["wrong"], "it went unseen"


@pytest.mark.campaign
def test_after_any_power_cut_what_was_acknowledged_is_there(
    cuts: Callable[..., Any], counted: Callable[..., None]
) -> None:
    found = cuts("--workloads", "50", "--states", "40")
    counted(
        "power cut, 50 workloads: what may be left of the files", found["counts"]["states"], wrong=len(found["wrong"])
    )
    assert found["wrong"] == []
    assert found["counts"]["states"] == 2000


@pytest.mark.campaign
def test_the_campaign_sees_each_precaution_that_is_missing(
    cuts: Callable[..., Any], counted: Callable[..., None]
) -> None:
    wanted = [*TAKEN_OUT, "row-first"]
    unseen = [what for what in wanted if not cuts("--workloads", "10", "--planted", what)["wrong"]]
    counted("one precaution taken out, which power cuts must show; wrong: unseen", len(wanted), wrong=len(unseen))
    assert unseen == []
