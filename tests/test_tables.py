"""Tables are those that the committed results give."""

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


@pytest.mark.parametrize("name", tables.TABLES)
def test_pages_show_the_committed_results(name: str) -> None:
    page, text = tables.filled(name)
    assert text == page.read_text(encoding="utf-8"), "run python benchmarks/tables.py"


def test_missing_marks_are_an_error() -> None:
    with pytest.raises(ValueError, match="found 0"):
        tables.fill("no marks here", "ttft", "table")


def test_a_report_without_a_part_has_no_table_of_it() -> None:
    for make in (tables.warm_up_table, tables.launches_table, tables.batch_table):
        assert make({}) == "No result of this is kept yet."


def test_attention_shows_what_was_timed_beside_it() -> None:
    kept = {"gpu": "G", "torch": "1", "rows": [{"case": "one", "us": 5.0, "floor_us": 1.0, "flashinfer_us": {}}]}
    many = {"case": "many", "us": 7.0, "unshared_us": 30.0, "floor_us": 2.0}
    many["flashinfer_us"] = {"flat": 40.0, "cascade": 12.34}
    lines = tables.attention_table({**kept, "rows": [*kept["rows"], many]}).splitlines()
    assert lines[-2:] == ["| one | 5.0 |  |  | 1.0 |", "| many | 7.0 | 30.0 | 12.3 (cascade) | 2.0 |"]


def test_launches_stand_in_the_order_of_their_rows() -> None:
    launches = {"question of 16": 9, "decoding of 16": 3, "decoding of 2, drawn": 5, "decoding of 2": 2}
    lines = tables.launches_table({"launches": launches}).splitlines()[2:]
    assert lines == ["| decoding of 2 | 2 | 5 |", "| decoding of 16 | 3 |  |", "| question of 16 | 9 |  |"]


def test_transformers_shows_each_kind_of_attention_that_was_tried() -> None:
    report = json.loads((tables.RESULTS / "gpu.json").read_text(encoding="utf-8"))
    tried = {"torch's choice": 18.0, "without cuDNN": 40.0}
    row = {"what": "decode, eager, short", "value": 40.0, "unit": "tokens/s", "tried": tried}
    plain = {"what": "decode, compiled", "value": 327.0, "unit": "tokens/s"}
    text = tables.gpu_table({**report, "transformers": [row, plain]})
    assert "| decode, eager, short | 40 tokens/s | 18 tokens/s | 40 tokens/s |" in text
    assert "| decode, compiled | 327 tokens/s |  |  |" in text


def test_warm_up_has_a_column_per_process() -> None:
    steps = {"import_s": 4.0, "open_s": 30.0, "warm_up_s": 12.34, "warm_up_64_s": 5.0}
    rows = [{"process": name, **steps} for name in ("first process", "second process")]
    lines = tables.warm_up_table({"warm_up": rows}).splitlines()
    assert lines[0] == "| | first process, s | second process, s |"
    assert "| `warm_up()` | 12.3 | 12.3 |" in lines


def test_a_batch_is_shown_with_the_tokens_that_stay_the_same() -> None:
    errors = {"requests": 64, "tokens": 256, "alone": 0.01, "together": 0.02, "between": 0.005}
    same = {"greedy_equal": 61, "greedy_alone_as_float32": 60, "greedy_together_as_float32": 59}
    lines = tables.batch_table({"batch": {**errors, **same}}).splitlines()[-3:]
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "1.00% | 60 of 64 |",
        "2.00% | 59 of 64 |",
        "0.50% | 61 of 64 |",
    ]
