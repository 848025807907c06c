"""The README's table is the one that the committed results give."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
assert spec
assert spec.loader
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def test_the_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = json.loads((ROOT / "benchmarks" / "results" / "ttft.json").read_text(encoding="utf-8"))
    assert tables.fill(readme, "ttft", tables.ttft_table(report)) == readme, "run python benchmarks/tables.py"


def test_missing_marks_are_an_error() -> None:
    with pytest.raises(ValueError, match="found 0"):
        tables.fill("no marks here", "ttft", "table")
