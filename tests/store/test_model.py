"""Calls in any order on two handles of one store, compared with a model; see `campaign/machine.py`. A part runs always,
all of it by `pytest -m campaign`."""

from collections.abc import Callable
from typing import Any

import pytest


def test_a_store_answers_as_its_model_does(campaign: Callable[..., Any]) -> None:
    found = campaign("machine.py", "--examples", "8")["counts"]
    assert found["steps"] >= 300
    assert min(found.values()) >= 5, "each kind of call must be tried"


@pytest.mark.campaign
def test_a_store_answers_as_its_model_does_10_000_times(
    campaign: Callable[..., Any], counted: Callable[..., None]
) -> None:
    found = campaign("machine.py", "--examples", "250")["counts"]
    counted("any call in any order, compared with a model", found["steps"])
    assert found["steps"] >= 10_000
