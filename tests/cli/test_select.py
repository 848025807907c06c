"""Which chunks a word means: the same for every command that takes names, ids and globs."""

from collections.abc import Callable
from typing import Any

import pytest

from braidsdk.store import ChunkStore

Cli = Callable[..., Any]

QUESTION = "What is the capital of Aistonia?"


@pytest.fixture
def notes(cli: Cli, tmp_path: Any) -> Cli:
    """Three texts. The name of the first is a glob that matches the second, and not itself."""
    with ChunkStore(tmp_path / "store") as store:
        for name, text in (("notes[1]", "The first."), ("notes1", "The second."), ("notes2", "The third.")):
            store.add_chunk(namespace="default", level=1, text=text, name=name)
    return cli


def shown(cli: Cli, *words: str) -> list[str]:
    return [each["name"] for each in cli("show", *words, "--json").json]


def removed(cli: Cli, *words: str) -> list[str]:
    return [each["name"] for each in cli("rm", *words, "--yes", "--json").json["deleted"]]


def asked(cli: Cli, *words: str) -> list[str]:
    options = [option for word in words for option in ("-c", word)]
    answer = cli("ask", QUESTION, "-n", "1", "--explain", "--json", *options).json
    return [each["label"] for each in answer["explanation"]["chunks"] if each["chunk_id"]]


def chatted(cli: Cli, *words: str) -> list[str]:
    options = [option for word in words for option in ("-c", word)]
    return cli("chat", "-q", *options, stdin="/chunks\n").stderr.splitlines()


def added(cli: Cli, *words: str) -> list[str]:
    lines = cli("chat", "-q", "-c", "notes2", stdin=f"/drop notes2\n/add {' '.join(words)}\n/chunks\n").stderr
    return lines.splitlines()


def dropped(cli: Cli, *words: str) -> list[str]:
    lines = cli("chat", "-q", stdin=f"/drop {' '.join(words)}\n/chunks\n").stderr.splitlines()
    return [name for name in ("notes[1]", "notes1", "notes2") if name not in lines]


COMMANDS = [shown, removed, asked, chatted, added, dropped]


@pytest.mark.parametrize("chosen", COMMANDS, ids=lambda command: command.__name__)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["notes[1]"], ["notes[1]"]),
        (["notes[12]"], ["notes1", "notes2"]),
        (["notes*"], ["notes[1]", "notes1", "notes2"]),
    ],
    ids=["a name that is a glob", "a glob", "a glob that matches a name with brackets"],
)
def test_every_command_takes_a_word_for_the_same_chunks(
    notes: Cli, chosen: Callable[..., list[str]], words: list[str], expected: list[str]
) -> None:
    assert chosen(notes, *words) == expected


def test_chunks_come_in_the_order_of_the_words_each_once(notes: Cli) -> None:
    for chosen in (shown, asked, chatted, added):
        assert chosen(notes, "notes2", "notes*", "notes1") == ["notes2", "notes[1]", "notes1"]


def test_a_listing_shows_what_a_name_that_is_a_glob_stands_for(notes: Cli) -> None:
    assert [each["name"] for each in notes("ls", "notes[1]", "--json").json] == ["notes[1]"]
    assert [each["name"] for each in notes("ls", "notes[12]", "--json").json] == ["notes1", "notes2"]


@pytest.mark.parametrize("arguments", [("show",), ("rm", "--yes"), ("ask", QUESTION, "-c"), ("chat", "-c")])
def test_a_glob_that_matches_nothing_is_not_found(notes: Cli, arguments: tuple[str, ...]) -> None:
    assert "No chunk has a name that matches 'x*'." in notes(*arguments, "x*", code=3).stderr
