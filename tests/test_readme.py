"""The README's snippets run, and its commands are the ones that CI runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]" && .venv/bin/'


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_two_commands_do_all_the_set_up() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python3 -m venv")]
    assert lines == [f"{SETUP}braid demo", f"{SETUP}pytest -n auto"]


def test_ci_finds_the_test_command() -> None:
    (pattern,) = re.findall(r"grep -E '(.*)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert [found[0] for found in re.finditer(pattern, README, flags=re.MULTILINE)] == [f"{SETUP}pytest -n auto"]


def test_python_snippets_run_twice_and_the_second_run_computes_only_the_question(tmp_path: Path) -> None:
    (snippet,) = blocks("python")
    assert len(snippet.strip().splitlines()) <= 12
    outputs = [
        subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(2)
    ]
    first, second = outputs
    assert first[0].startswith("Flubarg.")
    assert first[0] == second[0], "the same answer and counts"
    assert second[1].endswith("0 to compute")


def test_shell_snippet_answers_about_a_folder_with_nothing_but_the_virtual_environment(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (snippet,) = [block for block in blocks("bash") if "braid add" in block]
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    folder = tmp_path / "path" / "to" / "my-texts"
    folder.mkdir(parents=True)
    (folder / "aistonia.txt").write_text("The capital of Aistonia is Flubarg.\n", encoding="utf-8")
    (tmp_path / "path" / "to" / "Qwen3-0.6B").symlink_to(tiny_checkpoint)
    assert snippet.count("How long is the refund period?") == snippet.count("braid chat\n") == 1
    script = snippet.replace("How long is the refund period?", "What is the capital of Aistonia?").replace(
        "braid chat\n", "echo 'What is the capital of Aistonia?' | braid chat\n"
    )
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env={**os.environ, "BRAID_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["Flubarg.", "Flubarg."]


@pytest.mark.parametrize(
    "document",
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks" / "results" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert all((document.parent / link).exists() for link in links), links
    named = re.findall(r"`((?:braidsdk|kernels|store|models|tests|docs|examples|benchmarks)/[\w./-]*)`", text)
    assert all((ROOT / name).exists() for name in named), named
