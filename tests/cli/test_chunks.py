"""`braid ls`, `show`, `rm` and `stats`: what is registered, without a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk.cli.select import reading_order
from braidsdk.store import ChunkRow, ChunkStore

Cli = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path, files: Path) -> Path:
    """A store with two files, one of them in pieces, and a system prompt, put there without a model."""
    folder = tmp_path / "store"
    with ChunkStore(folder) as opened:
        for name, text in (
            ("guide.md#2", "Second."),
            ("guide.md#10", "Tenth."),
            ("notes.txt", "Notes about\n\tthings."),
            ("guide.md#1", "First."),
        ):
            opened.add_chunk(namespace="default", level=1, text=text, name=name, metadata={"by": "me"})
        opened.add_chunk(namespace="default", level=0, text="Be brief.", name="rules")
        opened.add_chunk(namespace="default", level=1, text="Nameless.")
        opened.add_chunk(namespace="other", level=1, text="Elsewhere.", name="elsewhere")
    return folder


def row(name: str | None, level: int = 1) -> ChunkRow:
    return ChunkRow(id=str(name), namespace="default", level=level, text="", name=name)


def test_reading_order_is_system_prompts_then_files_with_their_pieces_in_order() -> None:
    given = [row("b#2"), row("a"), row("b#10"), row("rules", 0), row(None), row("b#1"), row("#3"), row("c#x")]
    assert [each.name for each in reading_order(given)] == ["rules", "b#1", "b#2", "b#10", "a", None, "#3", "c#x"]


@pytest.mark.usefixtures("store")
class TestLs:
    def test_lists_in_reading_order_a_line_each_with_tabs(self, cli: Cli) -> None:
        lines = cli("ls").stdout.splitlines()
        assert [line.split("\t")[0] for line in lines] == [
            "rules", "guide.md#1", "guide.md#2", "guide.md#10", "notes.txt", ""
        ]  # fmt: skip
        name, level, ident, text = lines[4].split("\t")
        assert (name, level, len(ident), text) == ("notes.txt", "1", 32, "Notes about things.")

    def test_a_glob_or_the_start_of_a_name_filters(self, cli: Cli) -> None:
        assert [each["name"] for each in cli("ls", "*.txt", "--json").json] == ["notes.txt"]
        assert [each["name"] for each in cli("ls", "guide", "--json").json] == [
            "guide.md#1",
            "guide.md#2",
            "guide.md#10",
        ]
        nothing = cli("ls", "nothing*")
        assert nothing.stdout == ""
        assert "No chunks match 'nothing*'" in nothing.stderr

    def test_level_limit_and_namespace(self, cli: Cli) -> None:
        assert [each["name"] for each in cli("ls", "--level", "0", "--json").json] == ["rules"]
        limited = cli("ls", "--limit", "2")
        assert len(limited.stdout.splitlines()) == 2
        assert "and 4 more" in limited.stderr
        assert [each["name"] for each in cli("ls", "--namespace", "other", "--json").json] == ["elsewhere"]

    def test_json_has_everything(self, cli: Cli) -> None:
        [found] = cli("ls", "notes.txt", "--json").json
        assert found["text"] == "Notes about\n\tthings."
        assert found["metadata"] == {"by": "me"}
        assert found["names"] == ["notes.txt"]


@pytest.mark.usefixtures("store")
class TestShow:
    def test_shows_facts_and_text(self, cli: Cli) -> None:
        shown = cli("show", "notes.txt").stdout
        assert "name:      notes.txt\n" in shown
        assert '{"by": "me"}' in shown
        assert "none stored" in shown
        assert shown.endswith("\n\nNotes about\n\tthings.\n")

    def test_text_alone_of_several(self, cli: Cli) -> None:
        assert cli("show", "guide*", "--text").stdout == "First.\nSecond.\nTenth.\n"

    def test_an_id_will_do(self, cli: Cli) -> None:
        [found] = cli("show", "rules", "--json").json
        assert cli("show", found["id"], "--text").stdout == "Be brief.\n"

    def test_a_misspelt_name_gets_a_suggestion(self, cli: Cli) -> None:
        assert "Did you mean 'notes.txt'?" in cli("show", "nots.txt", code=3).stderr
        assert "matches 'x*'" in cli("show", "x*", code=3).stderr


@pytest.mark.usefixtures("store")
class TestRm:
    def test_without_a_terminal_it_needs_yes(self, cli: Cli) -> None:
        assert "--yes" in cli("rm", "rules", code=2).stderr
        assert len(cli("ls", "--json").json) == 6

    def test_globs_and_names_go_and_are_counted(self, cli: Cli) -> None:
        ended = cli("rm", "guide*", "rules", "guide.md#1", "--yes", "--json").json
        assert [each["name"] for each in ended["deleted"]] == ["guide.md#1", "guide.md#2", "guide.md#10", "rules"]
        assert (ended["entries"], ended["bytes"]) == (0, 0)
        assert [each["name"] for each in cli("ls", "--json").json] == ["notes.txt", None]

    def test_one_that_is_not_there_leaves_all(self, cli: Cli) -> None:
        cli("rm", "rules", "nobody", "--yes", code=3)
        assert len(cli("ls", "--json").json) == 6


def test_entries_are_shown_by_model_counted_and_deleted_with_what_saw_them(cli: Cli, random_checkpoint: Path) -> None:
    cli("add", "--system", "--name", "rules", "rules.txt")
    cli("add", "--anchor", "rules", "aistonia.txt", "belmora.txt")
    cli("add", "--system", "--name", "rules", "rules.txt", "--model", str(random_checkpoint), "--dtype", "bfloat16")
    [found] = cli("show", "aistonia.txt", "--json").json
    hit, miss = found["entries"]
    assert (hit["hit"], hit["model"], hit["dtype"], hit["after"]) == (True, "braid-tiny", "float32", ["rules"])
    assert hit["bytes"] > 0 < hit["tokens"]
    assert miss == {"hit": False, "model": str(random_checkpoint), "dtype": "bfloat16"}
    words = cli("show", "aistonia.txt").stdout
    assert "hit,  braid-tiny float32, " in words
    assert "after rules" in words

    stats = cli("stats", "--json").json
    assert (stats["chunks"], stats["entries"]) == (3, 4)
    assert {(group["model"], group["level"], group["entries"]) for group in stats["groups"]} == {
        ("braid-tiny", 0, 1),
        ("braid-tiny", 1, 2),
        (str(random_checkpoint), 0, 1),
    }
    assert sum(group["bytes"] for group in stats["groups"]) == stats["bytes"]
    assert (stats["hits"], stats["misses"]) == (0, 0)
    cli("ask", "Who?", "-n", "1")
    assert cli("stats", "--json").json["hits"] == 3
    assert "3 hits, 0 misses" in cli("stats").stdout

    ended = cli("rm", "rules", "--yes")
    assert "1 chunk deleted, with 4 KV entries" in ended.stderr
    assert cli("stats", "--json").json["entries"] == 0


@pytest.mark.parametrize("command", [("ls",), ("show", "x"), ("rm", "x"), ("stats",)], ids=" ".join)
def test_a_store_that_is_not_there_is_not_made(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    assert "No store at" in cli(*command, code=3).stderr
    assert not (tmp_path / "store").exists()
