"""`braid ask`: which chunks, how the answer comes, and what is said about the cache."""

import json
from collections.abc import Callable
from typing import Any

import pytest

Cli = Callable[..., Any]

CAPITAL = "What is the capital of Aistonia?"


@pytest.fixture
def added(cli: Cli) -> Cli:
    """The documents, computed after the system prompt."""
    cli("add", "--system", "--name", "rules", "rules.txt", "-q")
    cli("add", "--anchor", "rules", "aistonia.txt", "belmora.txt", "-q")
    return cli


def test_the_answer_alone_is_on_stdout(added: Cli) -> None:
    assert added("ask", CAPITAL).stdout == "Flubarg.\n"
    assert added("ask", CAPITAL, "-q").stderr == ""
    assert added("ask", "-", stdin=f"{CAPITAL}\n").stdout == "Flubarg.\n"


def test_chunks_are_chosen_by_name_id_and_glob_in_their_order(added: Cli) -> None:
    chosen = ("-c", "rules", "-c", "bel*", "-c", "aistonia.txt", "-c", "*.txt")
    asked = added("ask", CAPITAL, *chosen, "--explain", "--json").json
    assert [chunk["label"] for chunk in asked["explanation"]["chunks"]] == ["rules", "belmora.txt", "aistonia.txt"]
    assert asked["usage"]["computed_tokens"] < asked["usage"]["cached_tokens"]
    by_id = added("show", "aistonia.txt", "--json").json[0]["id"]
    assert added("ask", CAPITAL, "-c", "rules", "-c", by_id).stdout == "Flubarg.\n"


def test_explain_says_what_is_expected_and_what_then_was(added: Cli) -> None:
    said = added("ask", CAPITAL, "--explain", "-q").stderr
    assert "hit  " in said
    assert "aistonia.txt: in store" in said
    assert [line.split() for line in said.splitlines() if "expected" in line and "real" in line] == [
        ["expected", "real"]
    ]
    assert any(line.split()[:2] == ["cached", "tokens"] for line in said.splitlines())


def test_a_stream_is_the_same_answer(added: Cli) -> None:
    assert added("ask", CAPITAL, "--stream").stdout == "Flubarg.\n"
    lines = [json.loads(line) for line in added("ask", CAPITAL, "--stream", "--json", "--explain").stdout.splitlines()]
    *pieces, last = lines
    assert "".join(piece["piece"] for piece in pieces) == last["answer"]["text"] == "Flubarg."
    assert len(pieces) > 1
    assert last["answer"]["explanation"]["mode"] == "anchored"


def test_sources_are_bars_under_the_answer(added: Cli) -> None:
    asked = added("ask", CAPITAL, "--sources", "-q")
    assert asked.stdout == "Flubarg.\n"
    first, second = asked.stderr.splitlines()
    assert (first.split()[-1], second.split()[-1]) == ("aistonia.txt", "belmora.txt")
    percents = [float(line.split()[-2].rstrip("%")) for line in (first, second)]
    assert percents[0] > percents[1]
    assert sum(percents) == pytest.approx(100, abs=0.2)
    bars = [line.count("█") for line in (first, second)]
    assert bars == pytest.approx([24 * percent / 100 for percent in percents], abs=1)
    assert added("ask", CAPITAL, "--sources", "--stream").stdout == "Flubarg.\n"


def test_sources_in_json(added: Cli) -> None:
    asked = added("ask", CAPITAL, "--sources", "--json").json
    assert [source["name"] for source in asked["sources"]] == ["aistonia.txt", "belmora.txt"]
    assert added("show", asked["sources"][0]["id"], "--json").json[0]["name"] == "aistonia.txt"
    assert sum(source["share"] for source in asked["sources"]) == pytest.approx(1)
    assert "".join(token["text"] for token in asked["token_sources"]) == asked["text"]
    assert {len(token["shares"]) for token in asked["token_sources"]} == {2}
    assert "sources" not in added("ask", CAPITAL, "--json").json
    *_, last = added("ask", CAPITAL, "--sources", "--stream", "--json").stdout.splitlines()
    assert json.loads(last)["answer"]["sources"] == asked["sources"]


def test_sampling_options_reach_the_model(added: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert added("ask", CAPITAL, "-n", "1", "--json").json["finish_reason"] == "length"
    assert added("ask", CAPITAL, "--stop", "barg").stdout == "Flu\n"
    draw = ("ask", CAPITAL, "-t", "5", "--top-k", "0", "--seed", "1", "-n", "8")
    assert added(*draw).stdout == added(*draw).stdout != "Flubarg.\n"
    monkeypatch.setenv("BRAID_MODE", "exact")
    assert added("ask", CAPITAL, "--explain", "--json").json["explanation"]["mode"] == "exact"


def test_settings_come_from_the_environment(added: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_DTYPE", "bfloat16")
    assert "bfloat16" in added("ask", CAPITAL).stderr
    assert "float32" in added("ask", CAPITAL, "--dtype", "float32").stderr
    monkeypatch.setenv("BRAID_NAMESPACE", "elsewhere")
    assert "no chunks in namespace 'elsewhere'" in added("ask", CAPITAL, "-n", "1").stderr


@pytest.mark.filterwarnings("default")  # as in a user's process
def test_warnings_are_a_line_without_a_file_name(added: Cli) -> None:
    said = added("ask", CAPITAL, "--thinking").stderr
    assert "braid: warning: thinking=True changes nothing" in said
    assert ".py" not in said
