"""The documentation is right: its commands and snippets run, and what is generated or recorded is up to date."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import braidsdk
from braidsdk import Braid, errors
from braidsdk.cli.exits import MEANINGS
from braidsdk.testing import FakeBraid

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks of code, also those within lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", read(page), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(script).stem, DOCS / script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(block: str, **names: Any) -> dict[str, Any]:
    exec(compile(block, "documentation", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRAID_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


# what is generated


def test_the_commands_reference_is_what_the_code_says() -> None:
    text = read("command-line.md")
    assert load("write_commands.py").page(text) == text, "run python docs/write_commands.py"


def test_the_pages_tables_of_exit_codes_and_variables_are_complete() -> None:
    text = read("command-line.md")
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, flags=re.MULTILINE))
    assert set(rows) == {str(code) for code in MEANINGS}
    assert all(rows[str(code)].startswith(meaning) for code, meaning in MEANINGS.items())
    named = set(re.findall(r"`(BRAID_\w+)`", text))
    assert named >= set(re.findall(r"env var: (BRAID_\w+)", text))


def test_the_recorded_session_still_prints_the_same() -> None:
    script, page = load("record_session.py"), read("session.md")
    assert script.without_times(script.recorded(page)) == script.without_times(page), (
        "if this is meant, run python docs/record_session.py"
    )


def test_masking_hides_times_and_nothing_else() -> None:
    masked = load("record_session.py").without_times
    assert masked("load   12.5 ms, 28 tokens/s") == masked("load  9.0 ms, 1,028 tokens/s")
    assert masked("69 tokens cached") == "69 tokens cached"
    assert masked("1.2 MB to write, 75.0 GB free") == masked("1.2 MB to write, 3 GB free") != masked("2 MB to write")


# the reference


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: braidsdk\.(\w+)$", pages, flags=re.MULTILINE))
    assert documented >= set(braidsdk.__all__) - {"BraidError"}, "BraidError is among the errors"


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(DOCS).as_posix() for path in PAGES])
def test_errors_named_in_a_page_exist(page: Path) -> None:
    named = set(re.findall(r"`(\w+Error)`", page.read_text(encoding="utf-8")))
    assert named <= set(errors.__all__)


# what can be run


def test_the_first_page_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("index.md", "python")
    run(block)
    assert capsys.readouterr().out == "Flubarg.\n"


def test_the_tests_of_the_page_on_testing_pass() -> None:
    for block in blocks("how-to/testing.md", "python"):
        names = run(block, FakeBraid=FakeBraid)
        (test,) = [value for name, value in names.items() if name.startswith("test_")]
        test()


def test_objects_of_retrievers_go_in_as_they_come() -> None:
    (block,) = [block for block in blocks("how-to/retriever.md", "python") if "--8<--" not in block]
    documents = [SimpleNamespace(page_content="Refunds take 30 days.", metadata={"page": 3})]
    with FakeBraid(lambda question, texts: f"{question} {texts}") as braid:
        run(
            block,
            braid=braid,
            rules=braid.register_system("Answer."),
            documents=documents,
            question="How long?",
            splitter=SimpleNamespace(split_documents=list),
            retriever=SimpleNamespace(invoke=lambda _: documents),
        )
        (chunk,) = braid.chunks.list(level=1)
    assert (chunk.text, chunk.metadata) == ("Refunds take 30 days.", {"page": 3})


@pytest.fixture
def my_texts(tmp_path: Path) -> None:
    folder = tmp_path / "path" / "to" / "my-texts"
    folder.mkdir(parents=True)
    (folder / "refunds.md").write_text("Refunds are made within 30 days.\n\n" * 80, encoding="utf-8")
    (folder / "guide.md").write_text("# Guide\n\nPress the button.\n", encoding="utf-8")


@pytest.mark.usefixtures("my_texts")
def test_getting_started_gets_from_a_folder_of_texts_to_answers(
    tmp_path: Path, random_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checkpoint of random weights: all is real but the sense of the answers."""
    (tmp_path / "path" / "to" / "Qwen3-0.6B").symlink_to(random_checkpoint)
    _install, model, register, ask = blocks("getting-started.md", "bash")
    folder_line = next(line for line in model.splitlines() if "# a folder" in line)
    script = "\n".join([folder_line, register, ask.replace("braid chat", "echo 'And then?' | braid chat")])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "refunds.md#2" in done.stdout

    (block,) = blocks("getting-started.md", "python")
    with Braid("path/to/Qwen3-0.6B") as braid:
        assert len(braid.chunks.list(name="refunds*")) > 1
    run(block)
    assert capsys.readouterr().out
