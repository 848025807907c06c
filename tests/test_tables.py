"""Tables are those that the committed results give."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
assert spec
assert spec.loader
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


@pytest.mark.parametrize("name", tables.TABLES)
def test_pages_show_the_committed_results(name: str) -> None:
    page, text = tables.filled(name)
    assert text == page.read_text(encoding="utf-8"), "run python benchmarks/tables.py"


def test_missing_marks_are_an_error() -> None:
    with pytest.raises(ValueError, match="found 0"):
        tables.fill("no marks here", "ttft", "table")
