"""How commands print: pipes, terminals, JSON, quiet; and how fast they start."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk.store import ChunkStore

Cli = Callable[..., Any]
Child = Callable[..., subprocess.Popen[str]]
Start = Callable[..., Any]

TEXT = "A text that is much longer than a narrow terminal is wide, and \x1b[31mcoloured\x1b[0m besides."


@pytest.fixture
def store(tmp_path: Path, files: Path) -> None:
    with ChunkStore(tmp_path / "store") as opened:
        for number in range(300):
            opened.add_chunk(namespace="default", level=1, text=f"{number} {TEXT}", name=f"chunk-{number}")


@pytest.mark.usefixtures("store")
class TestTerminal:
    def test_a_table_fits_a_narrow_terminal(self, terminal: Start) -> None:
        code, shown = terminal("ls", "--limit", "3").end()
        lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
        assert code == 0
        assert lines[0].split() == ["name", "level", "id", "text"]
        assert all(len(line) <= 50 for line in lines)
        assert "…" in lines[1]

    def test_no_color_means_no_color(self, terminal: Start) -> None:
        assert "\x1b[" in terminal("ls", "--limit", "3").end()[1]
        _, shown = terminal("ls", "--limit", "3", NO_COLOR="1").end()
        assert not re.search(r"\x1b\[[0-9;]*3\dm", shown)
        assert "\x1b[31m" not in shown

    def test_rm_asks_and_takes_no_for_an_answer(self, cli: Cli, terminal: Start) -> None:
        for typed, code in (("n\n", 1), ("y\n", 0)):
            cli("show", "chunk-7")
            asked = terminal("rm", "chunk-7")
            asked.answer("Delete chunk-7, and", typed)
            assert asked.end()[0] == code
        cli("show", "chunk-7", code=3)


@pytest.mark.usefixtures("store")
class TestPipes:
    def test_piped_rows_are_whole_lines_without_escapes(self, child: Child) -> None:
        stdout, _ = child("ls", env={**os.environ, "COLUMNS": "30", "FORCE_COLOR": "1"}).communicate(timeout=60)
        lines = stdout.splitlines()
        assert len(lines) == 300
        assert all(line.count("\t") == 3 and line.endswith("besides.") for line in lines)
        assert "\x1b" not in stdout

    def test_a_reader_that_goes_away_ends_it_without_a_word(self, child: Child) -> None:
        process = child("ls", "--json")
        assert process.stdout is not None
        assert process.stdout.read(1) == "["
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141

    def test_a_reader_that_went_away_before_is_met_with_the_same_grace(self, child: Child) -> None:
        reads, writes = os.pipe()
        os.close(reads)
        process = child("show", "chunk-1", stdout=writes)
        os.close(writes)
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 141

    def test_text_is_printed_as_it_is(self, cli: Cli) -> None:
        assert cli("show", "chunk-1", "--text").stdout == f"1 {TEXT}\n"

    def test_an_old_encoding_of_the_terminal_is_no_error(self, child: Child, tmp_path: Path) -> None:
        with ChunkStore(tmp_path / "store") as opened:
            opened.add_chunk(namespace="u", level=1, text="π ≈ 3,14", name="pi")
        env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        assert child("show", "pi", "--text", "--namespace", "u", env=env).communicate()[0].startswith("\\u03c0")
        [found] = json.loads(child("show", "pi", "--json", "--namespace", "u", env=env).communicate()[0])
        assert found["text"] == "π ≈ 3,14"


LIGHT = {
    "help": ["--help"],
    "version": ["--version"],
    "ls": ["ls"],
    "show": ["show", "chunk-1"],
    "rm": ["rm", "chunk-2", "--yes"],
    "stats": ["stats"],
}


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT)
def test_commands_without_a_model_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'semantic_text_splitter'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['braid', *{arguments!r}]\n"
        "from braidsdk.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "heavy: []"


def test_completion_knows_the_commands(child: Child) -> None:
    env = {**os.environ, "_BRAID_COMPLETE": "complete_bash", "COMP_WORDS": "braid do", "COMP_CWORD": "1"}
    stdout, stderr = child(env=env).communicate(timeout=60)
    assert stdout.split() == ["doctor"], stderr


def test_a_closed_stdin_is_an_empty_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "sh",
            "-c",
            f"'{sys.executable}' -P -c 'from braidsdk.cli import main; main()' ask - --store '{tmp_path}/s' <&-",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, -11)
    assert "Traceback" not in done.stderr
    assert "braid: " in done.stderr
