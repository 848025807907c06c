"""`braid log`, `braid restore` and `braid pin`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

TEXTS = [f"The capital of Aistonia is {city}." for city in ("Zorbin", "Flubarg", "Kelmo")]


@pytest.fixture
def ids(cli: Cli) -> list[str]:
    """The ids of three editions of one document, the oldest first."""
    found = []
    for edition in range(3):
        Path("guide.txt").write_text(TEXTS[edition])
        cli("add", "guide.txt", "--replace")
        found.append(cli("show", "guide.txt", "--json").json[0]["id"])
    return found


def test_log_lists_what_a_name_stood_for(cli: Cli, ids: list[str]) -> None:
    lines = [line.split("\t") for line in cli("log", "guide.txt").stdout.splitlines()]
    assert [(line[2], line[3]) for line in lines] == [(ids[n], TEXTS[n]) for n in (2, 1, 0)]
    assert [line[1] == "now" for line in lines] == [True, False, False]
    assert [each["id"] for each in cli("log", "guide.txt", "--json").json] == ids[::-1]


def test_restore_lets_a_name_stand_for_it_again(cli: Cli, ids: list[str]) -> None:
    assert cli("restore", "guide.txt").stdout.split("\t")[1] == ids[1]
    assert cli("restore", "guide.txt", ids[0][:6]).stdout.split("\t")[1] == ids[0]
    assert cli("show", "guide.txt", "--json").json[0]["text"] == TEXTS[0]
    assert "must have stood for" in cli("restore", "guide.txt", "0" * 32, code=3).stderr


def test_log_of_what_is_no_name(cli: Cli, ids: list[str]) -> None:
    assert "Did you mean 'guide.txt'" in cli("log", "guide.tx", code=3).stderr
    assert "is an id" in cli("log", ids[2], code=2).stderr


def test_pin(cli: Cli, ids: list[str]) -> None:
    assert cli("pin", "guide*").stdout == f"{ids[2]}\tguide.txt\n"
    assert cli("show", "guide.txt", "--json").json[0]["pinned"]
    cli("pin", "guide.txt", "--off")
    assert not cli("show", "guide.txt", "--json").json[0]["pinned"]
