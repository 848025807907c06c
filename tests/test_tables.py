"""The pages show the tables that the committed results give."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
assert spec
assert spec.loader
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def kept(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((tables.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", tables.TABLES)
def test_pages_show_the_committed_results(name: str) -> None:
    page, text = tables.filled(name)
    assert text == page.read_text(encoding="utf-8"), "run python benchmarks/tables.py"


def test_the_readme_says_what_the_longest_prompt_gains() -> None:
    times = {"resident_ms": 134.0, "from_disk_ms": 490.0, "full_prefill_ms": 16412.0}
    rows = [
        {"prompt_tokens": tokens, **{name: {"median": value * scale} for name, value in times.items()}}
        for tokens, scale in ((8239, 1.0), (559, 0.1))
    ]
    sentence = tables.gain({"rows": rows, "cores": 2})
    assert sentence.startswith("8,239 prompt tokens, Qwen3-0.6B's geometry, 2 CPU cores: 0.13 s with caches in memory")
    assert "0.49 s from disk" in sentence
    assert "takes 16.4 s" in sentence


def test_a_user_gets_ten_rows() -> None:
    reports = [kept(name) for name in ("gpu", "vllm", "serving", "serving-cpu")]
    rows = [line for line in tables.overview(*reports).splitlines() if line.startswith(("| GPU", "| CPU"))]
    assert len(rows) == 10
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows]
    assert all(len(row) == 5 for row in cells)
    (row,) = [row for row in cells if row[1] == "first token, any order, 8k"]
    (prefill,) = [row for row in reports[0]["transformers"] if row["what"] == "full prefill, 8k"]
    assert row[3] == f"{prefill['value']:,.2f} ms"
    assert cells[-1][0] == "CPU"
    assert cells[-1][2].endswith(f"({kept('serving-cpu')['eight_over_one']:.2f} x)")


def test_the_ten_rows_say_where_transformers_was_timed() -> None:
    gpu, *others = [kept(name) for name in ("gpu", "vllm", "serving", "serving-cpu")]
    for earlier, said in ((["transformers"], "an earlier run"), ([], "the same run")):
        assert f"| transformers, {said} |" in tables.overview({**gpu, "kept_from_an_earlier_run": earlier}, *others)


def test_the_ten_rows_leave_out_what_no_result_is_kept_of() -> None:
    gpu = {name: value for name, value in kept("gpu").items() if name not in ("transformers", "warm_up")}
    text = tables.overview(gpu, kept("vllm"), {}, {})
    assert "first token, any order, 8k" in text
    assert "CPU" not in text
    assert "warm_up" not in text


def test_missing_marks_are_an_error() -> None:
    with pytest.raises(ValueError, match="found 0"):
        tables.fill("no marks here", "ttft", "table")


def test_a_report_without_a_part_has_no_table_of_it() -> None:
    for make in (tables.serving_table, tables.warm_up_table, tables.launches_table, tables.batch_table):
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


def test_vllm_stands_beside_our_rows_and_what_has_no_row_follows() -> None:
    vllm = {"gpu": "G", "versions": {"vllm": "9", "torch": "1"}, "model": "M", "engine": "E", "how": "H."}
    rows = [("decode, 1 request, 8k", 123.0), ("decode, 1 request, 1k", 45.0)]
    vllm["rows"] = [{"what": what, "value": value, "unit": "tokens/s"} for what, value in rows]
    lines = tables.gpu_table(kept("gpu"), vllm).splitlines()
    (row,) = [line for line in lines if line.startswith("| decode, 1 request, 8k |")]
    assert row.endswith("| 123 tokens/s |")
    assert "vLLM: one G, torch 1; M; E. H." in lines
    assert "| decode, 1 request, 1k | 45 tokens/s |" in lines


def test_limits_name_the_bandwidth_that_they_come_from() -> None:
    report = kept("gpu")
    constant = {name: value for name, value in report.items() if name != "copy_bytes_per_s"} | {"bytes_per_s": 4.24e12}
    assert "over 4.24 TB/s, a constant: that of a device copy on one H200." in tables.gpu_table(constant, kept("vllm"))
    measured = tables.gpu_table({**report, "copy_bytes_per_s": 2.8e12}, kept("vllm"))
    assert "over 2.80 TB/s, the best device copy of the same run." in measured


def test_transformers_shows_each_kind_of_attention_that_was_tried() -> None:
    report = kept("gpu")
    tried = {"torch's choice": 18.0, "without cuDNN": 40.0}
    row = {"what": "decode, eager, short", "value": 40.0, "unit": "tokens/s", "tried": tried}
    plain = {"what": "decode, compiled", "value": 327.0, "unit": "tokens/s"}
    text = tables.gpu_table({**report, "transformers": [row, plain]}, kept("vllm"))
    assert "| decode, eager, short | 40 tokens/s | 18 tokens/s | 40 tokens/s |" in text
    assert "| decode, compiled | 327 tokens/s |  |  |" in text


def test_parts_of_an_earlier_run_are_named() -> None:
    report = {**kept("gpu"), "kept_from_an_earlier_run": ["launches", "batch"]}
    assert "of an earlier run on the same kind of GPU: launches, batch." in tables.gpu_table(report, kept("vllm"))
    assert "earlier run on" not in tables.gpu_table({**report, "kept_from_an_earlier_run": []}, kept("vllm"))


def test_warm_up_has_a_column_per_process() -> None:
    steps = {"import_s": 4.0, "open_s": 30.0, "warm_up_s": 12.34, "warm_up_64_s": 5.0}
    rows = [{"process": name, **steps} for name in ("first process", "second process")]
    lines = tables.warm_up_table({"warm_up": rows}).splitlines()
    assert lines[0] == "| | first process, s | second process, s |"
    assert "| `warm_up()` | 12.3 | 12.3 |" in lines


def test_serving_shows_each_load_and_what_else_was_measured() -> None:
    times = {"first_token_ms": {"p50": 2.0, "p99": 12.34}, "inter_token_ms": {"p50": 3.456, "p99": 1234.0}}
    rows = [
        {"pool": "resident", "load": "closed", "callers": 64, "failed": 0, "requests_per_s": 123.4, **times},
        {"pool": "third", "load": "poisson", "arrivals_per_s": 61.7, "failed": 3, "tokens_per_step": 9.87},
    ]
    shape = {"chunks": 256, "chunk_tokens": 512, "drawn": 8, "answer_tokens": 64}
    report = {"device": "G", "versions": {"torch": "1"}, "model": "M", "shape": shape, "rows": rows}
    report["aask8"] = {"requests": 8, "tokens": 16, "aask_passes": 17, "ask_many_passes": 16}
    report["join"] = {"callers": 64, "joins": 9, "join_us": 98.7, "leave_us": 40.4, "place_us": 20.0}
    lines = tables.serving_table({**report, "threads": {"skipped": "why"}, "eight_over_one": 2.345}).splitlines()
    assert lines[0].startswith("One G, torch 1; M. 256 chunks of 512 tokens, 8 in a request; answers of 64 tokens")
    assert lines[4:6] == [
        "| all | 64 callers | 123 | 2.00 and 12.3 | 3.46 and 1,234 |  |  |  |",
        "| a third | 62 arrivals/s |  |  |  |  | 9.87 | 3 |",
    ]
    assert lines[9:] == [
        "| requests/s of 8 callers over those of one | 2.35 x |",
        "| passes for 8 `aask` of 16 tokens at once, and for one `ask_many` | 17 and 16 |",
        "| host time of a join and of a leave among 64 rows | 99 and 40 us; 20 us a step that has some |",
    ]


def test_a_batch_is_shown_with_the_tokens_that_stay_the_same() -> None:
    errors = {"requests": 64, "tokens": 256, "alone": 0.01, "together": 0.02, "between": 0.005}
    same = {"greedy_equal": 61, "greedy_alone_as_float32": 60, "greedy_together_as_float32": 59}
    lines = tables.batch_table({"batch": {**errors, **same}}).splitlines()[-3:]
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "1.00% | 60 of 64 |",
        "2.00% | 59 of 64 |",
        "0.50% | 61 of 64 |",
    ]


def tiny_cell(kind: str, documents: int, modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"kind": kind, "documents": documents, "questions": 50, "modes": modes}


def test_the_readme_says_what_the_default_costs() -> None:
    shares = {"direct": (0.946, 1.0), "alias": (0.508, 0.994)}
    cells = [
        tiny_cell(kind, documents, {"anchored": {"right": anchored / documents * 6}, "exact": {"right": exact}})
        for kind, (anchored, exact) in shares.items()
        for documents in (2, 6)
    ]
    sentence = tables.cost({"cells": cells})
    assert sentence.startswith("50 questions of braid-tiny over 6 documents")
    assert "95 % against 100 %\nwhere one document" in sentence
    assert "51 % against 99 % where another" in sentence


def test_quality_shows_right_answers_and_those_made_worse() -> None:
    won = {"value": 0.5, "low": 0.25, "high": 0.756}
    whole, base = {"right": 0.99, "worse": 0.0}, {"right": 0.5, "worse": 0.0}
    some = {"right": 0.75, "worse": 0.04, "budget": 0.164, "won_back": won}
    modes = {"exact": whole, "anchored": base, "guided(0.15)": some}
    all_ratios = {**modes, "guided(0.05)": {**some, "budget": 0.05}, "guided(0.05)+shift": some, "random(0.1)": some}
    cells = [tiny_cell("alias", 6, all_ratios), tiny_cell("direct", 6, modes)]
    report = {"dtype": "bfloat16", "cells": cells}
    lines = tables.quality_table(report).splitlines()
    assert lines[2] == "| question | documents | exact | anchored | guided(0.15) |"
    assert lines[4:] == [
        "| one fact | 6 | 99 | 50 | 75 (4) |",
        "| a name that another document explains | 6 | 99 | 50 | 75 (4) |",
    ]
    assert len(lines) == 6
    modes["anchored"] = {**base, "over_isolated": {"value": -0.05, "low": -0.1, "high": 0.01}}
    assert tables.quality_table(report).splitlines()[-1].endswith("lies below 0: nowhere.")
    modes["guided(0.15)"] = {**some, "over_isolated": {"value": -0.05, "low": -0.1, "high": -0.01}}
    said = tables.quality_table(report).splitlines()[-1]
    assert said.endswith("lies below 0: guided(0.15), one fact, 6 documents: -5 [-10, -1].")
    modes["guided(0.15)"] = some
    assert tables.curves_table(report).splitlines() == [
        "| question | repair | 5 % | 10 % | 15 % |",
        "| --- | --- | ---: | ---: | ---: |",
        "| a name that another document explains, 6 documents | guided | 50 [25, 76] |  | 50 [25, 76] |",
        "| a name that another document explains, 6 documents | guided+shift | 50 [25, 76] |  |  |",
        "| a name that another document explains, 6 documents | random |  | 50 [25, 76] |  |",
    ]


def test_a_real_model_has_a_table_for_each_set_of_questions() -> None:
    def of(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    exact = {"kl": of(0.0), "budget": of(1.0), "contains": of(0.6), "contains_of_full": of(1.0)}
    some = {**exact, "kl": of(0.2), "budget": of(0.164), "recovered": of(0.8), "worse": of(0.05)}
    one = {"licence": "L", "questions": 30, "model": "M", "dtype": "D", "modes": {"exact": exact, "guided(0.1)": some}}
    one["recovered_more"] = {"mode": "guided(0.1)", "than": "blended(0.2)", **of(0.24)}
    one["sources"] = {"anchored": {"right_answers": 9, "gold_first": 0.94, "lost_without_first": 0.9}}
    one["sources"]["anchored"]["lost_without_another"] = 0.18
    other: dict[str, Any] = {**one, "sources": {}}
    del other["recovered_more"]
    other["modes"] = {"exact": {"kl": of(0.0), "budget": of(1.0)}}
    report = {"sets": {"SQuAD": one, "MuSiQue": other}}
    lines = tables.real_table(report).splitlines()
    assert lines[0] == "SQuAD (L), 30 questions; M, D, a CPU:"
    row = "| guided(0.1) | 16 | 0.200 [0.100, 0.300] | 80 [70, 90] | 5 | 60 [50, 70] | 100 [90, 110] |"
    assert row in lines
    assert "guided(0.1) recovers 24 [14, 34] points more than blended(0.2), question by question." in lines
    assert lines[-1] == "| exact | 100 | 0 |  |  |"
    tiny = {"cells": [{"documents": 2}, {"documents": 30}]}
    tiny["sources"] = {"right_answers": 1000, "first": 0.987, "by_third": [{"first": 1.0}, {"first": 0.9}]}
    sources = tables.sources_table(tiny, report).splitlines()
    assert "| 1,000 | 98.7% (by the third of the context it stands in: 100.0%, 90.0%) |" in sources[2]
    assert sources[3:] == ["| M, SQuAD | anchored | 9 | 94% | 90% | 18% |"]


def test_repairs_are_shown_beside_full_prefill() -> None:
    whole = {"first_token_ms": 40_000.0, "budget": None, "of_full_prefill": 1.0}
    some = {"first_token_ms": 2_570.0, "budget": 0.029, "of_full_prefill": 0.0635}
    report = {"model": "M", "chunks": 16, "chunk_tokens": 512, "cores": 2, "device": "C", "kernels": "native"}
    lines = tables.repairs_table({**report, "modes": {"full prefill": whole, "linked(16)": some}}).splitlines()
    assert lines[0] == "M, 16 chunks of 512 tokens, 2 cores of C, native kernels; medians:"
    assert lines[4:] == ["| full prefill |  | 40.00 | 100.0 |", "| linked(16) | 3 | 2.57 | 6.3 |"]
    on_gpu = {**report, "device": "G", "kernels": "triton", "modes": {"linked(16)": some}}
    first, _, header, _, line = tables.repairs_table(on_gpu).splitlines()
    assert first == "M, 16 chunks of 512 tokens, one G, triton kernels; medians:"
    assert header == "| mode | budget, % | first token, ms | of full prefill, % |"
    assert line == "| linked(16) | 3 | 2570.0 | 6.3 |"


def test_whether_speed_lasts_is_shown_by_the_first_and_the_last_questions() -> None:
    first = {"hit_rate": 1.0, "first_token_ms": 20.18, "decode_tokens_per_s": 129.2, "anonymous_mib": 1073.8}
    last = {**first, "first_token_ms": 19.68}
    report = {"cpu": "C", "threads": 2, "questions": 1000, "chunks": 200, "modes": {"anchored": [first, {}, last]}}
    lines = tables.steady_table(report).splitlines()
    assert lines[0] == "braid-tiny, 1,000 questions over 200 chunks, 2 threads of C:"
    assert lines[4:] == [
        "| anchored | first fifth | 100 | 20.2 | 129 | 1,074 |",
        "| anchored | last fifth | 100 | 19.7 | 129 | 1,074 |",
    ]
