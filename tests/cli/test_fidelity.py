"""`braid fidelity`: the file, the modes, what is printed; and the certificates that `braid show` lists."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


@pytest.fixture
def added(cli: Cli, files: Path) -> Cli:
    """The documents, computed after the system prompt, and two questions over them."""
    cli("add", "--system", "--name", "rules", "rules.txt", "-q")
    cli("add", "--anchor", "rules", "aistonia.txt", "belmora.txt", "-q")
    asked = [
        {"question": "What is the capital of Aistonia?", "answers": ["Flubarg"]},
        {"question": "What is the capital of Belmora?", "chunks": ["belmora.txt"]},
    ]
    (files / "asked.json").write_text(json.dumps(asked))
    return cli


def test_json_has_all_modes_and_outcomes_and_certificates_follow(added: Cli) -> None:
    run = ("fidelity", "--questions", "asked.json", "--modes", "isolated, anchored", "-n", "8")
    measured = added(*run, "--json").json
    assert [each["mode"] for each in measured["modes"]] == ["exact", "isolated", "anchored"]
    assert measured["modes"][0]["kl"]["value"] == 0.0
    assert measured["full_prefill_fails"] == 0.0
    assert [each["chunks"] for each in measured["outcomes"]] == [2, 1]
    shown = added(*run).stdout
    assert "contains the reference" in shown
    listed = added("show", "--json").json
    assert {(each["mode"], each["fewest_chunks"], each["most_chunks"]) for each in listed} == {
        (mode, 1, 2) for mode in ("exact", "isolated", "anchored")
    }
    assert {each["model"] for each in listed} == {"braid-tiny"}
    rows = [line.split("\t") for line in added("show").stdout.splitlines()]
    assert [row[:3] for row in rows] == [[mode, "1-2", "2"] for mode in ("anchored", "exact", "isolated")]
    answer = added("ask", "What is the capital of Aistonia?", "--json").json
    assert answer["fidelity"]["mode"] == "anchored"
    assert answer["fidelity"]["contains"] == 1.0
    one = added("ask", "What is the capital of Aistonia?", "--json", "-c", "rules", "-c", "aistonia.txt", "-n", "1")
    assert one.json["fidelity"]["questions"] == 2, "one chunk was measured, too"
    assert "No certificates" in added("show", "--namespace", "else").stderr


def test_a_sample_of_lines_over_chosen_chunks(added: Cli, files: Path) -> None:
    (files / "asked.jsonl").write_text('"Who?"\n"Where?"\n"When?"\n')
    chosen = ("-c", "rules", "-c", "bel*", "--sample", "2", "--seed", "1", "--not-found", "flub", "-n", "2", "--json")
    measured = added("fidelity", "--questions", "asked.jsonl", *chosen).json
    assert (measured["questions"], measured["given"], measured["most_chunks"]) == (2, 3, 1)
    assert measured["not_found"] == ["flub"]
    assert measured["with_references"] == 0
    assert [each["mode"] for each in measured["modes"]] == ["exact", "anchored"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--questions", "nowhere.json"), 3, "nowhere.json can't be read"),
        (("--questions", "rules.txt"), 2, "rules.txt must be JSON; line 1, column 1"),
        (("--questions", "asked.json", "--modes", "anchord"), 2, "Did you mean 'anchored'?"),
        (("--questions", "asked.json", "--sample", "3"), 2, "sample must be a whole number from 1 to 2"),
        (("--questions", "asked.json", "-c", "nobody"), 3, "No chunk 'nobody'"),
        (("--questions", "asked.json", "-c", "rules"), 2, "Question 1 must be asked over at least one context chunk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_errors_are_a_line_and_a_code(added: Cli, arguments: tuple[str, ...], code: int, says: str) -> None:
    assert says in added("fidelity", *arguments, code=code).stderr


def test_commas_between_parentheses_belong_to_a_mode(added: Cli) -> None:
    said = added("fidelity", "--questions", "asked.json", "-m", "anchored,mixed(0.2, layer=2)", code=2).stderr
    assert "'mixed(0.2, layer=2)'" in said
