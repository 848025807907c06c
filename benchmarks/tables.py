"""Make the tables of four pages from the results in `benchmarks/results/`: the README, docs/performance.md and
docs/quality.md with what a user needs, and benchmarks/results/README.md with the rest.

python benchmarks/tables.py
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_NOTHING_KEPT = "No result of this is kept yet."


def gain(report: dict[str, Any]) -> str:
    """What a user gains on a CPU, by the longest prompt measured, as a sentence."""
    row = max(report["rows"], key=lambda row: row["prompt_tokens"])
    resident, disk, full = (row[name]["median"] / 1e3 for name in ("resident_ms", "from_disk_ms", "full_prefill_ms"))
    return (
        f"{row['prompt_tokens']:,} prompt tokens, Qwen3-0.6B's geometry, {report['cores']} CPU cores: {resident:.2f} s "
        f"with caches in memory and {disk:.2f} s from disk,\nin the default mode, where a full prefill by transformers "
        f"takes {full:.1f} s ([all lengths](#how-fast-on-a-cpu), [a GPU](docs/performance.md))."
    )


def overview(gpu: dict[str, Any], vllm: dict[str, Any], serving: dict[str, Any], serving_cpu: dict[str, Any]) -> str:
    """The rows that a user decides by, as Markdown. A row of which no result is kept is left out."""
    versions = gpu["versions"]
    cpu = ""
    if serving_cpu:
        cpu = f" CPU: {serving_cpu['device']}, {serving_cpu['cores']} cores, torch {serving_cpu['versions']['torch']}."
    old = "an earlier run" if "transformers" in gpu.get("kept_from_an_earlier_run", []) else "the same run"
    rows = [*_single_calls(gpu, vllm), *_warm_up_row(gpu), *_callers("GPU", serving), *_eight_callers(serving_cpu)]
    return "\n".join(
        [
            f"GPU: one {gpu['gpu']}, torch {versions['torch']}, triton {versions['triton']}, transformers "
            f"{versions['transformers']}.{cpu} Qwen3-0.6B's geometry, random weights, bfloat16. Medians:",
            "",
            f"| | what | BraidSDK | transformers, {old} | vLLM {vllm['versions']['vllm']}, an earlier run |",
            "| --- | --- | ---: | ---: | ---: |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *_shapes({"GPU": serving, "CPU": serving_cpu}),
        ]
    )


def _shapes(servings: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What the callers ask, by device."""
    for device, shape in ((device, report["shape"]) for device, report in servings.items() if report.get("rows")):
        yield (
            f"Callers on the {device}: {shape['chunks']} chunks of {shape['chunk_tokens']} tokens, {shape['drawn']} in "
            f"a request; answers of {shape['answer_tokens']} tokens."
        )


def _single_calls(gpu: dict[str, Any], vllm: dict[str, Any]) -> Iterator[list[str]]:
    """Calls of one program on the GPU, beside what transformers and vLLM take for the same."""
    ours, theirs, peers = (
        {row["what"]: row for row in rows} for rows in (gpu["rows"], gpu.get("transformers", []), vllm["rows"])
    )
    beside = {
        "first token, any order, 8k": "full prefill, 8k",
        "first token, same order again, 8k": "question over a ready cache, 8k",
        "first token, any order, 32k": "full prefill, 32k",
        "decode, 1 request, 8k": "decode, eager, 8k",
        "decode, 64 requests, one 8k, own orders": "",
        "registering 64 x 512": "",
    }
    for what, their_what in beside.items():
        if what in ours:
            cells = [_value(ours[what]), _value(theirs.get(their_what)), _value(peers.get(what))]
            if "eager" in their_what and cells[1]:
                cells[1] += " eager"
                compiled = [row for row in theirs.values() if row["what"].startswith("decode, compiled, ")]
                cells[1] += "".join(f"; {_value(row)} {row['what'].removeprefix('decode, ')}" for row in compiled)
            yield ["GPU", what, *cells]


def _warm_up_row(gpu: dict[str, Any]) -> Iterator[list[str]]:
    """Seconds until a Braid on the GPU is open and warm, in the first process on a machine and in a later one."""
    if rows := gpu.get("warm_up"):
        seconds = [f"{row['open_s'] + row['warm_up_s']:.1f} s" for row in rows]
        processes = ", ".join(row["process"] for row in rows)
        yield ["GPU", f"opening a Braid and `warm_up()`: {processes}", ", ".join(seconds), "", ""]


def _callers(device: str, serving: dict[str, Any]) -> Iterator[list[str]]:
    """Many callers together, with all entries in the pool and with a third of them."""
    pools = {"resident": "all entries in the pool", "third": "a third of the entries in the pool"}
    for row in serving.get("rows", []):
        if row.get("callers") == 64 and row["load"] == "closed":
            what = f"{row['callers']} callers, {pools[row['pool']]}: requests/s; first token, p50 and p99"
            yield [device, what, f"{_short(row['requests_per_s'])}; {_both(row['first_token_ms'])} ms", "", ""]


def _eight_callers(serving: dict[str, Any]) -> Iterator[list[str]]:
    """What a CPU gains from callers that ask at the same time."""
    by_callers = {row.get("callers"): row for row in serving.get("rows", []) if row["pool"] == "resident"}
    if ratio := serving.get("eight_over_one"):
        rates = [_short(by_callers[callers]["requests_per_s"]) for callers in (8, 1)]
        counts = [by_callers[callers]["requests"] for callers in (8, 1)]
        what = f"8 callers against 1: requests/s, of {counts[0]} and {counts[1]} requests"
        yield ["CPU", what, f"{rates[0]} against {rates[1]} ({ratio:.2f} x)", "", ""]


def ttft_table(report: dict[str, Any]) -> str:
    """First tokens by context length, as Markdown."""
    head = (
        f"{report['model']}, on {report['cores']} cores ({report['cpu']}), {report['threads']} threads, torch "
        f"{report['versions']['torch']}, transformers {report['versions']['transformers']}. First token of a "
        f"{report['question_tokens']}-token question over chunks of {report['chunk_tokens']} tokens, medians:"
    )
    lines = [
        head,
        "",
        "| prompt tokens | full prefill, transformers | from disk, fresh process | resident | registering | decode |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        ratios = row["ratios"]
        lines.append(
            f"| {row['prompt_tokens']:,} | {row['full_prefill_ms']['median']:,.0f} ms "
            f"| {row['from_disk_ms']['median']:,.0f} ms ({ratios['from_disk']:.1f} x) "
            f"| {row['resident_ms']['median']:,.0f} ms ({ratios['resident']:.1f} x) "
            f"| {ratios['register_over_prefill']:.2f} x the time of a prefill "
            f"| {ratios['decode']:.2f} x transformers |"
        )
    return "\n".join(lines)


def cpu_table(report: dict[str, Any]) -> str:
    """Kernels and weights on a CPU, as Markdown."""
    prompt = report["prompt"]
    head = (
        f"{report['model']}, on {report['cores']} cores ({report['cpu']}, {report['level']}), torch "
        f"{report['versions']['torch']}. {prompt['chunks']} chunks of {prompt['chunk_tokens']} tokens, a question of "
        f"{prompt['question_tokens']}; medians (least to greatest). The start is that of the process:"
    )
    lines = [
        head,
        "",
        "| | start to first token | first token, resident | decode, tokens/s | anonymous memory | registering |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, way in report["ways"].items():
        start, first, decode = (_ranged(way[key]) for key in ("start_s", "first_token_ms", "decode_tokens_per_s"))
        lines.append(
            f"| {name} | {start} s | {first} ms | {decode} | {way['anonymous_mib']['median']:,.0f} MiB "
            f"| {way['registering_tokens_per_s']:,.0f} tokens/s |"
        )
    return "\n".join(lines)


def _ranged(value: dict[str, float]) -> str:
    form = ",.0f" if value["median"] >= 50 else ".1f"
    return f"{value['median']:{form}} ({value['min']:{form}} to {value['max']:{form}})"


def attention_table(report: dict[str, Any]) -> str:
    """Microseconds of the attention kernel by case, and of what it was compared with, as Markdown."""
    rows = report["rows"]
    columns = {"case": [row["case"] for row in rows], "us": [f"{row['us']:.1f}" for row in rows]}
    if any("unshared_us" in row for row in rows):
        columns["one read per request, us"] = [
            f"{row['unshared_us']:.1f}" if "unshared_us" in row else "" for row in rows
        ]
    if any("flashinfer_us" in row for row in rows):
        columns["FlashInfer's best, us"] = [_best(row.get("flashinfer_us", {})) for row in rows]
    columns["bytes over 4.24 TB/s, us"] = [f"{row['floor_us']:.1f}" for row in rows]
    versions = ", ".join(f"{name} {report[name]}" for name in ("torch", "triton", "flashinfer") if name in report)
    return "\n".join(
        [
            f"One {report['gpu']}, {versions}, bfloat16, one layer of Qwen3-0.6B's geometry:",
            "",
            f"| {' | '.join(columns)} |",
            f"| --- |{' ---: |' * (len(columns) - 1)}",
            *(f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)),
        ]
    )


def _best(ways: dict[str, float]) -> str:
    """The fastest of some ways, by name."""
    return "{0[1]:.1f} ({0[0]})".format(min(ways.items(), key=lambda way: way[1])) if ways else ""


def linear_table(report: dict[str, Any]) -> str:
    """Microseconds of a decoder layer's linear operations and of the head, as Markdown."""
    lines = [
        f"One {report['gpu']}, torch {report['torch']}, triton {report['triton']}, {report['dtype']}:",
        "",
        "| geometry | operation | rows | ours, us | torch, us | floor, us |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['geometry']} | {row['op']} | {row['rows']:,} | {row['triton']['us']:,.1f} "
        f"| {row['torch']['us']:,.1f} | {row['floor_us']:,.1f} |"
        for row in report["rows"]
        if row["op"] in ("norm_qkv", "out_proj", "norm_swiglu", "down", "layer", "norm_head")
    ]
    return "\n".join(lines)


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.{2 if unit == 'ms' else 0}f} {unit}"


def _value(row: dict[str, Any] | None) -> str:
    return _number(row["value"], row["unit"]) if row else ""


def _bandwidth(report: dict[str, Any]) -> str:
    """What the limits were computed from; older runs did not measure it and took a constant."""
    if measured := report.get("copy_bytes_per_s"):
        return f"{measured / 1e12:.2f} TB/s, the best device copy of the same run"
    return f"{report['bytes_per_s'] / 1e12:.2f} TB/s, a constant: that of a device copy on one H200"


def gpu_table(report: dict[str, Any], vllm: dict[str, Any]) -> str:
    """Public calls on one GPU, with transformers in the same run and a recorded run of vLLM, as Markdown."""
    versions, peers = report["versions"], {row["what"]: row["value"] for row in vllm["rows"]}
    lines = [
        f"One {report['gpu']}, torch {versions['torch']}, triton {versions['triton']}, transformers "
        f"{versions['transformers']}; Qwen3-0.6B's geometry, random weights, bfloat16. The limit is what must be read "
        f"over {_bandwidth(report)}. Medians and ranges:",
        "",
        f"| what | ours | range | limit of the bandwidth | vLLM {vllm['versions']['vllm']}, an earlier run |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]

    for row in report["rows"]:
        unit = row["unit"]
        shown = [row["value"], row.get("limit"), peers.get(row["what"])]
        ours, limit, peer = (_number(value, unit) for value in shown)
        least, most = (_number(row[name], unit).split()[0] for name in ("least", "most"))
        lines.append(f"| {row['what']} | {ours} | {least} to {most} | {limit} | {peer} |")
    lines += [
        "",
        f"vLLM: one {vllm['gpu']}, torch {vllm['versions']['torch']}; {vllm['model']}; {vllm['engine']}. {vllm['how']}",
    ]
    shown_above = {row["what"] for row in report["rows"]}
    rest = [row for row in vllm["rows"] if row["what"] not in shown_above]
    lines += ["", "| vLLM, the same run, what has no row above | |", "| --- | ---: |"]
    lines += [f"| {row['what']} | {_number(row['value'], row['unit'])} |" for row in rest]
    if kept := report.get("kept_from_an_earlier_run"):
        lines += ["", f"These parts are of an earlier run on the same kind of GPU: {', '.join(kept)}."]
    lines += ["", *_transformers(report["transformers"])]
    lines += ["", "| decode, by geometry | context | ours | limit | share |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row['what']}{', int8' if row.get('weights') == 'int8' else ''} | {row.get('context', 1024):,} "
        f"| {_number(row['value'], row['unit'])} | {_number(row['limit'], row['unit'])} "
        f"| {row['value'] / row['limit']:.0%} |"
        for row in report["geometries"]
    ]
    noted = [row for row in report["geometries"] if "note" in row]
    lines += ["", *(f"{row['what']}, {row['weights']}: {row['note']}." for row in noted)]
    kernels = [row for row in report["profile"] if row["share"] >= 0.005]
    lines += ["", "| kernel of decoding at 8k | share of the GPU's time |", "| --- | ---: |"]
    lines += [f"| `{row['kernel'].split('<')[0]}` | {row['share']:.1%} |" for row in kernels]
    return "\n".join(lines)


def _transformers(rows: list[dict[str, Any]]) -> list[str]:
    """Its times; those that were tried with several kinds of attention kernels with all of them."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.get("tried", {})))
    heads = ["", *(f"attention kernels: {kind}" for kind in kinds)]
    lines = [f"| transformers | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for row in rows:
        tried = [_number(row.get("tried", {}).get(kind), row["unit"]) for kind in kinds]
        lines.append(f"| {' | '.join([row['what'], _number(row['value'], row['unit']), *tried])} |")
    return lines


def serving_table(report: dict[str, Any]) -> str:
    """Many callers at once, and what else `serving.py` measured, as Markdown."""
    rows = report.get("rows")
    if not rows:
        return _NOTHING_KEPT
    shape, versions = report["shape"], ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"One {report['device']}, {versions}; {report['model']}. {shape['chunks']} chunks of {shape['chunk_tokens']} "
        f"tokens, {shape['drawn']} in a request; answers of {shape['answer_tokens']} tokens:",
        "",
        "| pool holds | requests come from | requests/s | first token, p50 and p99, ms "
        "| between tokens, p50 and p99, ms | tokens/s | tokens a step | failed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        callers = (
            f"{row['callers']:,} {'caller' if row['callers'] == 1 else 'callers'}"
            if row["load"] == "closed"
            else f"{row['arrivals_per_s']:.2g} arrivals/s"
        )
        cells = [
            {"resident": "all", "third": "a third"}[row["pool"]],
            callers,
            _short(row.get("requests_per_s")),
            _both(row.get("first_token_ms")),
            _both(row.get("inter_token_ms")),
            _short(row.get("tokens_per_s")),
            _short(row.get("tokens_per_step")),
            f"{row['failed']:,}" if row["failed"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if singles := list(_singles(report)):
        lines += ["", "| what else | |", "| --- | ---: |", *(f"| {what} | {found} |" for what, found in singles)]
    return "\n".join(lines)


def _singles(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts of `serving.py` that are no row of its first table; skipped ones are left out."""
    if ratio := report.get("eight_over_one"):
        yield "requests/s of 8 callers over those of one", f"{ratio:.2f} x"
    for row in report.get("lone", []):
        rate = f"{row['value']:,.4g} tokens/s ({row['least']:,.4g} to {row['most']:,.4g})"
        yield f"decode of a caller alone, after {row['prompt_tokens']:,} tokens", rate
    if "aask_passes" in (row := report.get("aask8", {})):
        passes = f"{row['aask_passes']:,} and {row['ask_many_passes']:,}"
        yield f"passes for {row['requests']} `aask` of {row['tokens']} tokens at once, and for one `ask_many`", passes
    if "ratio" in (row := report.get("threads", {})):
        yield f"tokens/s of {row['threads']} threads that `ask`, over those of one `ask_many`", f"{row['ratio']:.2f} x"
    if (row := report.get("register", {})).get("ratio"):
        what = f"between tokens of {row['running']} answers while {row['texts']} x {row['text_tokens']} tokens register"
        yield f"{what}, p50 and p99, over those without", f"{row['ratio']['p50']:.2f} x and {row['ratio']['p99']:.2f} x"
    if "join_us" in (row := report.get("join", {})):
        times = f"{row['join_us']:.0f} and {row['leave_us']:.0f} us; {row['place_us']:.0f} us a step that has some"
        yield f"host time of a join and of a leave among {row['callers']} rows", times


def _short(value: float | None) -> str:
    """A number with three digits at least; nothing of nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _both(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{_short(value['p50'])} and {_short(value['p99'])}"


def warm_up_table(report: dict[str, Any]) -> str:
    """Seconds until a process is ready, as Markdown."""
    rows = report.get("warm_up")
    if not rows:
        return _NOTHING_KEPT
    steps = {
        "import_s": "importing torch and BraidSDK",
        "open_s": "opening the Braid, the kernels' self-test included",
        "warm_up_s": "`warm_up()`",
        "warm_up_64_s": "`warm_up(requests=64)` after it",
    }
    heads = [f"{row['process']}, s" for row in rows]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(rows)}"]
    lines += [f"| {name} | {' | '.join(f'{row[step]:.1f}' for row in rows)} |" for step, name in steps.items()]
    return "\n".join(lines)


def launches_table(report: dict[str, Any]) -> str:
    """Kernels of each captured pass, as Markdown."""
    launches = report.get("launches")
    if not launches:
        return _NOTHING_KEPT
    passes = [name for name in launches if "," not in name]  # passes of repairs launch as many
    passes.sort(key=lambda name: (name.split()[0], int(name.split()[-1])))
    lines = ["| graph | kernels, greedy | kernels, sampled |", "| --- | ---: | ---: |"]
    return "\n".join(
        [*lines, *(f"| {name} | {launches[name]} | {launches.get(f'{name}, drawn', '')} |" for name in passes)]
    )


def batch_table(report: dict[str, Any]) -> str:
    """How far logits depend on the batch, as Markdown."""
    batch = report.get("batch")
    if not batch:
        return _NOTHING_KEPT
    requests = batch["requests"]
    pairs = {
        "alone, and in float32": ("alone", "greedy_alone_as_float32"),
        f"one of {requests}, and in float32": ("together", "greedy_together_as_float32"),
        f"alone, and one of {requests}": ("between", "greedy_equal"),
    }
    lines = [
        f"Logits after {batch['tokens']} tokens, {requests} requests, bfloat16; float32 on torch's kernels:",
        "",
        "| | RMS of the difference over that of the logits | greedy tokens that are the same |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {pair} | {batch[error]:.2%} | {batch[same]} of {requests} |" for pair, (error, same) in pairs.items()]
    return "\n".join(lines)


def sample_table(report: dict[str, Any]) -> str:
    """Microseconds of choosing a token, as Markdown."""
    one, many = report["us"]["1"], report["us"]["64"]
    head = f"One {report['gpu']}, torch {report['torch']}, vocabulary of {report['vocab']:,}, us:"
    lines = [head, "", "| | 1 request | 64 requests |", "| --- | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {name} | {one[name]:,} | {many[name]:,} |" for name in one)])


def cost(report: dict[str, Any]) -> str:
    """What the default mode costs in answers, as a sentence."""
    cells = {(cell["kind"], cell["documents"]): cell["modes"] for cell in report["cells"]}
    said = {
        kind: [f"{100 * cells[kind, 6][mode]['right']:.0f} %" for mode in ("anchored", "exact")]
        for kind in ("direct", "alias")
    }
    return (
        f"{_asked(report)} of braid-tiny over 6 documents, answered right by the default mode and by a full prefill: "
        f"{' against '.join(said['direct'])}\nwhere one document holds the answer, {' against '.join(said['alias'])} "
        f"where another one explains the name that is asked for ([all modes, and what repairs win back]"
        f"(docs/quality.md#measured-braid-tiny))."
    )


_KINDS = {"direct": "one fact", "alias": "a name that another document explains", "chain": "a fact of a fact"}


def _asked(report: dict[str, Any]) -> str:
    """How many questions a cell has."""
    counts = sorted({cell["questions"] for cell in report["cells"]})
    return f"{' to '.join(f'{count:,}' for count in counts)} questions"


def quality_table(report: dict[str, Any]) -> str:
    """Right answers by mode, as Markdown."""
    modes = list(report["cells"][-1]["modes"])
    lines = [
        f"braid-tiny, {report['dtype']}; {_asked(report)} a row that the model has never seen. Right answers, %; in "
        f"brackets, what `anchored` gets right and this mode does not{_calibrated(report)}:",
        "",
        f"| question | documents | {' | '.join(modes)} |",
        f"| --- | ---: |{' ---: |' * len(modes)}",
    ]
    for cell in sorted(report["cells"], key=lambda cell: list(_KINDS).index(cell["kind"])):
        shown = [_right(cell["modes"][mode], brackets=mode not in ("exact", "anchored")) for mode in modes]
        lines.append(f"| {_KINDS[cell['kind']]} | {cell['documents']} | {' | '.join(shown)} |")
    return "\n".join([*lines, *_below_isolated(report)])


def _calibrated(report: dict[str, Any]) -> str:
    """What calibration made of a mode."""
    found = report.get("calibrated")
    return f". Calibrated, `guided(0.2)` is `{found}`" if found else ""


def _below_isolated(report: dict[str, Any]) -> list[str]:
    """Where a mode has fewer right answers than `isolated`, beyond the interval of the difference."""
    found = [
        f"{mode}, {_KINDS[cell['kind']]}, {cell['documents']} documents: {_percent(more)}"
        for cell in report["cells"]
        for mode, figures in cell["modes"].items()
        if (more := figures.get("over_isolated")) and more["high"] < 0
    ]
    if not any("over_isolated" in figures for cell in report["cells"] for figures in cell["modes"].values()):
        return []
    where = "; ".join(found) or "nowhere"
    return ["", f"Fewer right answers than `isolated`, in points, where the 95 % interval lies below 0: {where}."]


def _right(figures: dict[str, float], *, brackets: bool) -> str:
    worse = f" ({100 * figures['worse']:.0f})" if brackets else ""
    return f"{100 * figures['right']:.0f}{worse}"


def curves_table(report: dict[str, Any]) -> str:
    """What repairs win back by ratio, as Markdown: of cells that were asked at all ratios and lose something."""
    rows: dict[tuple[str, str], dict[float, str]] = {}
    for cell in report["cells"]:
        if len(cell["modes"]) > min(len(each["modes"]) for each in report["cells"]):
            for name, mode in cell["modes"].items():
                found = re.fullmatch(r"(\w+)\((0\.\d+)\)(.*)", name)
                if found and "won_back" in mode:
                    question = f"{_KINDS[cell['kind']]}, {cell['documents']} documents"
                    rows.setdefault((question, found[1] + found[3]), {})[float(found[2])] = _percent(mode["won_back"])
    ratios = sorted({ratio for row in rows.values() for ratio in row})
    lines = [f"| question | repair | {' | '.join(f'{100 * ratio:.0f} %' for ratio in ratios)} |"]
    lines.append(f"| --- | --- |{' ---: |' * len(ratios)}")
    for names, row in rows.items():
        lines.append(f"| {' | '.join([*names, *(row.get(ratio, '') for ratio in ratios)])} |")
    return "\n".join(lines)


def repairs_table(report: dict[str, Any]) -> str:
    """What modes cost until the first token, as Markdown."""
    on_gpu = report["kernels"] == "triton"
    device = f"one {report['device']}" if on_gpu else f"{report['cores']} cores of {report['device']}"
    lines = [
        f"{report['model']}, {report['chunks']} chunks of {report['chunk_tokens']} tokens, {device}, "
        f"{report['kernels']} kernels; medians:",
        "",
        f"| mode | budget, % | first token, {'ms' if on_gpu else 's'} | of full prefill, % |",
        "| --- | ---: | ---: | ---: |",
    ]
    for mode, found in report["modes"].items():
        budget = "" if found["budget"] is None else f"{100 * found['budget']:.0f}"
        first = f"{found['first_token_ms']:.1f}" if on_gpu else f"{found['first_token_ms'] / 1000:.2f}"
        lines.append(f"| {mode} | {budget} | {first} | {100 * found['of_full_prefill']:.1f} |")
    return "\n".join(lines)


def steady_table(report: dict[str, Any]) -> str:
    """Whether figures change while a process runs, as Markdown."""
    threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}"
    lines = [
        f"braid-tiny, {report['questions']:,} questions over {report['chunks']} chunks, {threads} of {report['cpu']}:",
        "",
        "| mode | questions | found, % | first token, ms | decoding, tokens/s | anonymous memory, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for mode, parts in report["modes"].items():
        for which, part in (("first fifth", parts[0]), ("last fifth", parts[-1])):
            lines.append(
                f"| {mode} | {which} | {100 * part['hit_rate']:.0f} | {part['first_token_ms']:.1f} "
                f"| {part['decode_tokens_per_s']:.0f} | {part['anonymous_mib']:,.0f} |"
            )
    return "\n".join(lines)


def _percent(value: dict[str, float] | None) -> str:
    """An estimate with its interval."""
    if value is None:
        return ""
    return f"{100 * value['value']:.0f} [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def store_table(report: dict[str, Any]) -> str:
    """How fast the store is beside plain reads and writes, as Markdown."""
    lines = [f"{report['cpu']}:", "", "| what | measured | range | required |", "| --- | ---: | ---: | ---: |"]
    for row in report["rows"]:
        ranged = f"{row['least']:.2f} to {row['most']:.2f}" if "least" in row else ""
        if "of_plain_speed" in row:
            shown, required = f"{row['of_plain_speed']:.2f} x of plain", f"{row['required']:.1f} x"
        elif "times" in row:
            shown, required = f"{row['times']:.2f} x", f"{row['required']:.1f} x at most"
        else:
            shown, required = f"{1e3 * row['seconds']:.1f} ms", f"{1e3 * row['required']:.0f} ms at most"
        lines.append(f"| {row['what']} | {shown} | {ranged} | {required} |")
    return "\n".join(lines)


def http_table(report: dict[str, Any]) -> str:
    """Callers over HTTP beside callers of the SDK, as Markdown."""
    lines = [
        f"{report['model']}, on {report['cores']} cores ({report['device']}), torch {report['versions']['torch']}:",
        "",
        "| callers | requests/s, SDK | over HTTP | first token, SDK | over HTTP | over HTTP, p99 / p50 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        sdk, http = row["sdk"], row["http"]
        cells = [
            str(row["callers"]),
            f"{sdk['requests_per_s']:.3g}",
            f"{http['requests_per_s']:.3g} ({row['of_sdk']:.0%})",
            f"{sdk['first_token_ms']['p50']:,.0f} ms",
            f"{http['first_token_ms']['p50']:,.0f} ms",
            f"{row['p99_over_p50']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def campaign_table(report: dict[str, Any]) -> str:
    """What was done to the store, how often, and how often something was wrong then, as Markdown."""
    rows = [f"| {row['what']} | {row['cases']:,} | {row['wrong']:,} |" for row in report["rows"]]
    return "\n".join(["| what happens | cases | wrong |", "| --- | ---: | ---: |", *rows])


def real_table(report: dict[str, Any]) -> str:
    """Modes against full prefill on a real model, as Markdown."""
    lines = []
    for name, found in report["sets"].items():
        answers = " | contains the reference, % | of full prefill's, %" if "contains" in found["modes"]["exact"] else ""
        lines += [
            f"{name} ({found['licence']}), {found['questions']} questions; {found['model']}, {found['dtype']}, "
            f"{found.get('device', 'a CPU')}:",
            "",
            f"| mode | budget, % | KL, nats | KL recovered, % | worse than anchored, %{answers} |",
            f"| --- | ---: | ---: | ---: | ---: |{' ---: | ---: |' if answers else ''}",
        ]
        for mode, figures in found["modes"].items():
            kl = figures["kl"]
            cells = [
                mode,
                f"{100 * figures['budget']['value']:.0f}",
                f"{kl['value']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}]" if kl["value"] else "0",
                _percent(figures.get("recovered")),
                f"{100 * figures['worse']['value']:.0f}" if "worse" in figures else "",
            ]
            if answers:
                cells += [_percent(figures["contains"]), _percent(figures.get("contains_of_full"))]
            lines.append(f"| {' | '.join(cells)} |")
        if more := found.get("recovered_more"):
            points = _percent(more)
            lines += ["", f"{more['mode']} recovers {points} points more than {more['than']}, question by question."]
        lines.append("")
    return "\n".join(lines[:-1])


def sources_table(tiny: dict[str, Any], real: dict[str, Any]) -> str:
    """How often the first source is the right one, as Markdown."""
    lines = [
        "| right answers of | mode | answers | the passage with the answer is first | lost without the first source "
        "| lost without another |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    found = tiny["sources"]
    thirds = ", ".join(f"{third['first']:.1%}" for third in found["by_third"])
    lines.append(
        f"| braid-tiny, one fact, {_documents(tiny)} documents | anchored | {found['right_answers']:,} "
        f"| {found['first']:.1%} (by the third of the context it stands in: {thirds}) |  |  |"
    )
    for name, each in real["sets"].items():
        for mode, sources in each["sources"].items():
            shares = [f"{sources[key]:.0%}" for key in ("gold_first", "lost_without_first", "lost_without_another")]
            lines.append(f"| {each['model']}, {name} | {mode} | {sources['right_answers']} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _documents(report: dict[str, Any]) -> str:
    counts = sorted({cell["documents"] for cell in report["cells"]})
    return f"{counts[0]} to {counts[-1]}"


_USERS, _REST, _QUALITY = "docs/performance.md", "benchmarks/results/README.md", "docs/quality.md"

TABLES = {
    "gain": ("README.md", "ttft.json", gain),
    "cost": ("README.md", "quality.json", cost),
    "quality": (_QUALITY, "quality.json", quality_table),
    "curves": (_QUALITY, "quality.json", curves_table),
    "real": (_QUALITY, "quality-real.json", real_table),
    "repairs": (_QUALITY, "repairs-cpu.json", repairs_table),
    "repairs-gpu": (_QUALITY, "repairs-cuda.json", repairs_table),
    "store": ("docs/store.md", "store.json", store_table),
    "campaign": ("docs/store.md", "store_campaign.json", campaign_table),
    "http": ("docs/serve.md", "serving-http-cpu.json", http_table),
    "sources": (_QUALITY, "quality.json quality-real.json", sources_table),
    "ttft": ("README.md", "ttft.json", ttft_table),
    "cpu": (_USERS, "cpu.json", cpu_table),
    "overview": (_USERS, "gpu.json vllm.json serving.json serving-cpu.json", overview),
    "steady": (_REST, "steady.json", steady_table),
    "gpu": (_REST, "gpu.json vllm.json", gpu_table),
    "warm_up": (_REST, "gpu.json", warm_up_table),
    "launches": (_REST, "gpu.json", launches_table),
    "batch": (_REST, "gpu.json", batch_table),
    "serving": (_REST, "serving.json", serving_table),
    "serving_cpu": (_REST, "serving-cpu.json", serving_table),
    "sample": (_REST, "kernels/sample.json", sample_table),
    "attention": (_REST, "kernels/attention.json", attention_table),
    "linear": (_REST, "kernels/linear.json", linear_table),
}
"""By the name of its marks: the page that a table stands in, the results that it shows (a space between two), and what
makes it."""


def fill(text: str, name: str, table: str) -> str:
    """Put a table between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of marks {name!r}, found {count}")
    return filled


def filled(name: str) -> tuple[Path, str]:
    """A table's page, and its text with the table made again."""
    page, results, make = TABLES[name]
    text = (ROOT / page).read_text(encoding="utf-8")
    return ROOT / page, fill(text, name, make(*(_kept(each) for each in results.split())))


def _kept(results: str) -> dict[str, Any]:
    """A report; an empty one where none is kept."""
    path = RESULTS / results
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def main() -> None:
    for name in TABLES:
        page, text = filled(name)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
