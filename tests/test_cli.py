"""The command line: data on stdout, errors in one line on stderr."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from braidsdk.cli.demo import load_samples

BRAID = str(Path(sys.executable).with_name("braid"))


def run(*arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([BRAID, *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_add_list_and_ask(tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store")]
    (tmp_path / "aistonia.txt").write_text("The capital of Aistonia is Flubarg.")
    (tmp_path / "rules.txt").write_text("You answer questions from the documents.")
    run("add", "--system", "--name", "rules", str(tmp_path / "rules.txt"), *store)
    added = json.loads(run("add", "--anchor", "rules", str(tmp_path / "aistonia.txt"), *store, "--json").stdout)
    assert [row["name"] for row in added["chunks"]] == ["aistonia.txt"]
    piped = run("add", "-", "--name", "belmora", *store, stdin="The capital of Belmora is Plonk.").stdout
    assert "belmora" in piped

    listed = json.loads(run("ls", *store, "--json").stdout)
    assert [(row["name"], row["level"]) for row in listed] == [("rules", 0), ("aistonia.txt", 1), ("belmora", 1)]
    assert "aistonia.txt" in run("ls", *store).stdout
    run("add", "-", "--name", "brackets", *store, "--namespace", "b", stdin="In [/b] brackets.")
    assert "In [/b] brackets." in run("ls", *store, "--namespace", "b").stdout

    asked = run("ask", "What is the capital of Aistonia?", *store, "--explain")
    assert asked.stdout == "Flubarg.\n"
    assert "miss belmora" in asked.stderr
    chosen = ["-c", "rules", "-c", "belmora", "--mode", "exact", "--json"]
    answer = json.loads(run("ask", "What is the capital of Belmora?", *chosen, *store).stdout)
    assert answer["text"] == "Plonk."
    assert answer["usage"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ask", "Who?", "-c", "nobody"], 3, "braid: No chunk 'nobody'"),
        (["add", "missing.txt"], 3, "braid: missing.txt can't be read"),
        (["ask", "Who?", "--model", "nowhere"], 3, "braid: No checkpoint at 'nowhere'"),
        (["add", "a", "b", "--name", "c"], 2, "--name must be given for one file only"),
        (["fly"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_a_line_and_a_code(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    store = [] if arguments == ["fly"] else ["--store", str(tmp_path / "store")]
    done = run(*arguments, *store, code=code)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_demo_answers_every_single_document_question_from_a_second_process(tmp_path: Path) -> None:
    """Into an empty store, as JSON; then once more, as a table, with all of it stored already."""
    samples = load_samples()
    assert sum(len(text.split()) for text in samples.documents.values()) > 700
    report = json.loads(run("demo", "--json", "--store", str(tmp_path / "store")).stdout)
    assert set(report) == {"answers", "reloaded", "store", "model"}
    assert report["reloaded"] is True
    assert {answer["mode"] for answer in report["answers"]} == {"exact", "anchored"}
    assert len({answer["question"] for answer in report["answers"]}) >= 10
    single = {question.question for question in samples.questions if not question.alias}
    assert all(answer["ok"] for answer in report["answers"] if answer["question"] in single)
    aistonia = [a for a in report["answers"] if a["question"] == "What is the capital of Aistonia?"]
    assert {answer["answer"] for answer in aistonia} == {"Flubarg."}
    assert all(answer["computed_tokens"] < 40 < answer["cached_tokens"] for answer in report["answers"])
    assert all(answer["ttft_ms"] > 0 < answer["full_prefill_ms"] for answer in report["answers"])

    again = run("demo", "--store", str(tmp_path / "store"))
    assert again.stderr.lstrip().startswith("0 tokens computed")
    assert "Flubarg." in again.stdout
    assert f"{len(report['answers'])} of {len(report['answers'])} right; every context token" in again.stdout
