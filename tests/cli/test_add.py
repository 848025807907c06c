"""`braid add`: what is read, how it is cut and named, and that a second run does only what changed."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk.cli.split import Splitter
from braidsdk.errors import InputError
from braidsdk.store import ChunkStore

Cli = Callable[..., Any]

FACTS = [f"The capital of Land{i} is Town{i}. Its river is the Brook{i}." for i in range(60)]
LONG = "\n\n".join(FACTS)


def names(ended: Any) -> list[str]:
    return [chunk["name"] for chunk in ended.json["chunks"]]


@pytest.fixture
def docs(files: Path) -> Path:
    folder = files / "docs"
    (folder / "more").mkdir(parents=True)
    (folder / "a.md").write_text("# A\n\nAbout A.")
    (folder / "more" / "b.txt").write_text("About B.")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden.md").write_text("Hidden.")
    return folder


@pytest.mark.usefixtures("random_model")
class TestReading:
    def test_a_folder_gives_its_text_files_named_by_their_path_in_it(self, cli: Cli, docs: Path) -> None:
        assert names(cli("add", "docs", "--json")) == ["a.md", "more/b.txt"]
        assert names(cli("add", str(docs), "--json")) == ["a.md", "more/b.txt"]

    def test_glob_chooses_other_files(self, cli: Cli, docs: Path) -> None:
        (docs / "notes.xyz").write_text("Notes.")
        assert names(cli("add", "docs", "--glob", "*.xyz", "--glob", "more/*", "--json")) == ["notes.xyz", "more/b.txt"]

    def test_a_quoted_glob_is_expanded(self, cli: Cli, docs: Path) -> None:
        assert names(cli("add", "docs/**/*.txt", "--json")) == ["more/b.txt"]
        assert "No file matches" in cli("add", "docs/*.rst", code=3).stderr

    def test_stdin_is_named_on_request(self, cli: Cli) -> None:
        assert names(cli("add", "-", "--name", "piped", "--json", stdin="One.\r\nTwo.")) == ["piped"]
        assert cli("show", "piped", "--text").stdout == "One.\nTwo.\n"
        assert names(cli("add", "-", "--json", stdin="Nameless.")) == [None]

    def test_what_holds_no_text_is_left_out_and_reported(self, cli: Cli, docs: Path) -> None:
        (docs / "empty.txt").write_text(" \n")
        (docs / "binary.txt").write_bytes(b"text\0text")
        (docs / "latin.txt").write_bytes("naïve".encode("latin-1"))
        ended = cli("add", "docs", "--json")
        assert [(each["name"], each["reason"]) for each in ended.json["skipped"]] == [
            ("docs/binary.txt", "is binary"),
            ("docs/empty.txt", "is empty"),
            ("docs/latin.txt", "is not UTF-8 text"),
        ]
        assert "skipped docs/binary.txt: is binary" in ended.stderr

    def test_strict_fails_before_anything_is_registered(self, cli: Cli, docs: Path) -> None:
        (docs / "empty.txt").write_text("")
        assert "docs/empty.txt: is empty" in cli("add", "docs", "--strict", code=1).stderr
        cli("ls", code=3)

    def test_a_folder_without_text_says_how_to_choose(self, cli: Cli, files: Path) -> None:
        (files / "none").mkdir()
        assert "--glob" in cli("add", "none", code=1).stderr

    def test_a_missing_file_is_not_found(self, cli: Cli) -> None:
        assert "missing.txt can't be read" in cli("add", "rules.txt", "missing.txt", code=3).stderr

    def test_two_files_of_one_name_are_refused(self, cli: Cli, docs: Path) -> None:
        (docs / "more" / "a.md").write_text("Another.")
        assert "both have the name 'a.md'" in cli("add", "docs/a.md", "docs/more/a.md", code=2).stderr

    def test_a_name_is_for_one_file(self, cli: Cli) -> None:
        assert "--name must be given for one file only" in cli("add", "a", "b", "--name", "c", code=2).stderr


class TestCutting:
    def test_pieces_fit_the_budget_and_end_with_a_sentence(self, tiny: Any) -> None:
        pieces = Splitter(tiny.count_tokens, 100).split(LONG)
        assert len(pieces) > 5
        assert all(tiny.count_tokens(piece) <= 100 for piece in pieces)
        assert all(piece.endswith(".") for piece in pieces)
        assert "\n\n".join(pieces) == LONG
        assert Splitter(tiny.count_tokens, 10_000).split(LONG) == [LONG]

    def test_a_sentence_that_is_too_long_is_cut_between_words(self) -> None:
        words = " ".join(f"word{i}" for i in range(100))
        pieces = Splitter(lambda text: len(text.split()), 16).split(words)
        assert " ".join(pieces) == words
        assert max(len(piece.split()) for piece in pieces) <= 16

    def test_a_budget_too_small_is_refused(self, cli: Cli) -> None:
        with pytest.raises(InputError, match="at least 16"):
            Splitter(len, 15)
        assert "at least 16" in cli("add", "rules.txt", "--chunk-tokens", "3", code=2).stderr

    @pytest.mark.usefixtures("random_model")
    def test_pieces_are_numbered_and_system_prompts_and_whole_files_are_not_cut(self, cli: Cli, files: Path) -> None:
        (files / "long.txt").write_text(LONG)
        cut = cli("add", "long.txt", "--chunk-tokens", "200", "--json")
        assert len(names(cut)) > 3
        assert names(cut) == [f"long.txt#{i + 1}" for i in range(len(names(cut)))]
        assert all(chunk["tokens"] <= 200 for chunk in cut.json["chunks"])
        whole = ("--chunk-tokens", "0", "--namespace", "whole", "--json")
        assert names(cli("add", "long.txt", *whole)) == ["long.txt"]
        system = ("--system", "--namespace", "system", "--chunk-tokens", "100", "--json")
        assert names(cli("add", "long.txt", *system)) == ["long.txt"]


@pytest.mark.usefixtures("random_model")
class TestAgain:
    def test_a_second_run_computes_only_what_changed(self, cli: Cli, files: Path) -> None:
        cli("add", "--system", "--name", "rules", "rules.txt")
        (files / "long.txt").write_text(LONG)
        options = ("--anchor", "rules", "--chunk-tokens", "200")
        first = cli("add", "long.txt", *options, "--json")
        entries = cli("stats", "--json").json["entries"]
        assert entries == len(names(first)) + 1

        again = cli("add", "long.txt", *options, "--json")
        assert "nothing to compute now" in again.stderr
        assert not any(chunk["new"] for chunk in again.json["chunks"])
        assert cli("stats", "--json").json["entries"] == entries

        (files / "long.txt").write_text(LONG + "\n\nOne more sentence about nothing.")
        more = cli("add", "long.txt", *options, "--json").json
        assert sum(chunk["new"] for chunk in more["chunks"]) == 1
        assert [chunk["id"] for chunk in more["chunks"]][:-1] == [chunk["id"] for chunk in first.json["chunks"]][:-1]
        assert len(more["gone"]) == 1

    def test_names_move_to_a_files_new_text_and_what_is_gone_is_said_then_pruned(self, cli: Cli, files: Path) -> None:
        (files / "long.txt").write_text(LONG)
        before = cli("add", "long.txt", "--chunk-tokens", "200", "--json").json["chunks"]
        (files / "long.txt").write_text("Short now.")
        ended = cli("add", "long.txt", "--json")
        assert names(ended) == ["long.txt"]
        assert {chunk["id"] for chunk in ended.json["gone"]} == {chunk["id"] for chunk in before}
        assert "--prune deletes them" in cli("add", "long.txt").stderr
        assert len(cli("ls", "--json").json) == len(before) + 1

        pruned = cli("add", "long.txt", "--prune", "--json").json
        assert pruned["pruned"]
        assert len(pruned["gone"]) == len(before)
        assert [chunk["name"] for chunk in cli("ls", "--json").json] == ["long.txt"]
        assert cli("add", "long.txt", "--prune", "--json").json["gone"] == []

    def test_pruning_a_folder_deletes_what_came_from_files_that_are_gone(
        self, cli: Cli, docs: Path, files: Path
    ) -> None:
        cli("add", "docs", "aistonia.txt")
        (docs / "a.md").unlink()
        assert [chunk["name"] for chunk in cli("add", "docs", "--prune", "--json").json["gone"]] == ["a.md"]
        assert sorted(chunk["name"] for chunk in cli("ls", "--json").json) == ["aistonia.txt", "more/b.txt"]

    def test_pruning_spares_a_text_that_another_file_has_too(self, cli: Cli, files: Path) -> None:
        (files / "copy.txt").write_text("The capital of Belmora is Plonk.")
        cli("add", "copy.txt")
        cli("add", "belmora.txt")
        (files / "belmora.txt").write_text("The capital of Belmora is Trouley.")
        assert cli("add", "belmora.txt", "--prune", "--json").json["gone"] == []
        assert cli("show", "copy.txt", "--text").stdout == "The capital of Belmora is Plonk.\n"

    def test_a_text_goes_when_the_last_of_its_files_goes_whatever_they_were_called(self, cli: Cli, docs: Path) -> None:
        (docs / "keep.txt").write_text("What stays.")
        (docs / "one.txt").write_text("What goes.")
        (docs / "two.txt").write_text("What goes.")
        cli("add", "docs", "--prune")
        count = len(cli("ls", "--json").json)
        (docs / "one.txt").rename(docs / "three.txt")
        assert cli("add", "docs", "--prune", "--json").json["gone"] == []
        (docs / "two.txt").write_text("Another text.")
        assert cli("add", "docs", "--prune", "--json").json["gone"] == []
        assert len(cli("ls", "--json").json) == count + 1
        (docs / "three.txt").rename(docs.parent / "elsewhere.txt")
        cli("add", "elsewhere.txt")
        assert cli("add", "docs", "--prune", "--json").json["gone"] == [], "another file has it"
        (docs.parent / "elsewhere.txt").write_text("Changed.")
        (gone,) = cli("add", "elsewhere.txt", "docs", "--prune", "--json").json["gone"]
        assert gone["name"] in ("one.txt", "three.txt")
        assert len(cli("ls", "--json").json) == count + 1

    def test_pruning_spares_what_no_file_was_the_source_of(self, cli: Cli, docs: Path, random_checkpoint: Path) -> None:
        """An application may keep paths in its own metadata."""
        from braidsdk import Braid

        cli("add", "docs")
        with Braid(random_checkpoint, device="cpu") as braid:
            braid.register("Of a loader.", name="mine", metadata={"source": str(docs / "nowhere.txt")})
            braid.chunks.update("a.md", name="alias")
        (docs / "a.md").unlink()
        assert cli("add", "docs", "--prune", "--json").json["gone"] == []
        assert {"mine", "a.md"} <= {each["name"] for each in cli("ls", "--json").json}

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_what_can_not_be_looked_into_is_named_and_not_pruned(self, cli: Cli, docs: Path) -> None:
        cli("add", "docs")
        (docs / "more").chmod(0)
        try:
            ended = cli("add", "docs", "--prune")
        finally:
            (docs / "more").chmod(0o755)
        assert "more: can't be read: Permission denied" in ended.stderr
        assert "more/b.txt" in cli("ls").stdout

    def test_a_file_behind_an_error_is_not_taken_for_gone(
        self, cli: Cli, docs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cli("add", "docs")
        (docs / "a.md").unlink()
        honest = Path.stat

        def refused(path: Path, **more: Any) -> os.stat_result:
            if path.name == "a.md":
                raise PermissionError(13, "Permission denied")
            return honest(path, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", refused)
            assert cli("add", "docs", "--prune", "--json").json["gone"] == []
        assert len(cli("add", "docs", "--prune", "--json").json["gone"]) == 1

    def test_files_with_one_text_count_as_one_chunk(self, cli: Cli, docs: Path) -> None:
        (docs / "c.txt").write_text("The same.")
        (docs / "d.txt").write_text("The same.")
        fresh = len({each["id"] for each in cli("add", "docs", "--json").json["chunks"]})
        assert cli("add", "docs").stderr.endswith(f"0 new, {fresh} unchanged.\n")

    def test_a_pipe_in_a_folder_is_named_and_not_waited_for(self, cli: Cli, docs: Path) -> None:
        os.mkfifo(docs / "pipe.log")
        ended = cli("add", "docs")
        assert "pipe.log: is no regular file" in ended.stderr
        assert "a.md" in ended.stdout

    def test_a_name_does_not_move_here_from_another_file_by_itself(self, cli: Cli, docs: Path) -> None:
        (docs / "rules.txt").write_text("Other rules.")
        cli("add", "rules.txt")
        assert "--replace" in cli("add", "docs/rules.txt", code=1).stderr
        assert cli("show", "rules.txt", "--text").stdout == "You answer questions from the documents.\n"
        cli("add", "docs/rules.txt", "--replace")
        assert cli("show", "rules.txt", "--text").stdout == "Other rules.\n"

    def test_metadata_that_was_there_stays(self, cli: Cli, files: Path, random_checkpoint: Path) -> None:
        from braidsdk import Braid

        cli("add", "aistonia.txt")
        with Braid(random_checkpoint, device="cpu") as braid:
            chunk = braid.chunks.get("aistonia.txt")
            braid.chunks.update(chunk, metadata={**chunk.metadata, "mine": 1})
        cli("add", "aistonia.txt")
        origin = {"source": str(files / "aistonia.txt"), "piece": 1, "pieces": 1}
        assert cli("show", "aistonia.txt", "--json").json[0]["metadata"] == {
            "mine": 1,
            **origin,
            "sources": [{**origin, "name": "aistonia.txt"}],
        }


@pytest.mark.usefixtures("random_model")
def test_the_estimate_comes_first_and_progress_does_not_reach_stdout(cli: Cli) -> None:
    cli("add", "--system", "--name", "rules", "rules.txt")
    ended = cli("add", "--anchor", "rules", "aistonia.txt")
    assert "to compute in" in ended.stderr
    assert "free on the disk" in ended.stderr
    assert "1 new, 0 unchanged" in ended.stderr
    assert ended.stdout.count("\n") == 1
    quiet = cli("add", "--anchor", "rules", "belmora.txt", "-q")
    assert quiet.stderr == ""


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_computed(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("add", "--system", "--name", "rules", "rules.txt")
    monkeypatch.setattr(ChunkStore, "free_bytes", 1000)
    ended = cli("add", "--anchor", "rules", "aistonia.txt", code=1)
    assert "Free" in ended.stderr or "free" in ended.stderr
    assert len(cli("ls", "--json").json) == 1


@pytest.mark.usefixtures("random_model")
def test_ctrl_c_keeps_what_was_computed_and_says_how_to_go_on(
    cli: Cli, child: Callable[..., subprocess.Popen[str]], files: Path, tmp_path: Path
) -> None:
    cli("add", "--system", "--name", "rules", "rules.txt")
    for number in range(40):
        text = "\n\n".join(f"{fact} It is number {number}." for fact in FACTS)
        (files / f"{number}.txt").write_text(text)
    process = child("add", "--anchor", "rules", "--glob", "[0-9]*.txt", ".")
    deadline = time.monotonic() + 60
    with ChunkStore(tmp_path / "store") as store:
        while store.stats("default").entries < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    kept = cli("stats", "--json").json["entries"]
    assert 1 < kept < len(cli("ls", "--json").json)
