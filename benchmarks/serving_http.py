"""Many callers of `braid serve`, beside callers of the SDK in the same run: random weights, bfloat16, greedy answers.

    python benchmarks/serving_http.py --device cpu --out serving-http-cpu.json    # some 5 minutes on two cores
    python benchmarks/serving_http.py --out serving-http.json                     # on a GPU, if there is one

The requests are those of `serving.py`: chunks drawn by Zipf(1.0) in a random order behind one system prompt, all in
memory; closed loops. Callers over HTTP name the chunks in `braid.chunks`, stream the answer, and run in a process of
their own; callers of the SDK are tasks in the model's process. The server runs in a thread of the model's process, over
the same Braid. For each number of callers the two take turns: SDK, HTTP, HTTP, SDK. Each number is the mean of its two
turns. `of_sdk` is the HTTP callers' requests/s as a share of the SDK's.

Before anything is measured the answers of both to the same requests are compared.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import serving
import torch
from random_model import save_checkpoint
from timing import Row
from ttft import cpu_name

from braidsdk.serve import Settings, create_app
from braidsdk.serve.run import Server, bind, config

MODEL, PATH = "random", "/v1/chat/completions"
REQUIRED = {"of_sdk": 0.85, "p99_over_p50": 3.0}


@contextmanager
def server(braid: Any) -> Iterator[int]:
    """A server over a Braid, in a thread: its port."""
    listening = bind("127.0.0.1", 0)
    running = Server(config(create_app(braid, Settings(name=MODEL))))
    thread = threading.Thread(target=lambda: asyncio.run(running._serve([listening])), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    running.should_exit = True
    thread.join()


def body_of(request: serving.Request, tokens: int, *, stream: bool = True) -> dict[str, Any]:
    """What a caller posts."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": request.question}],
        "max_tokens": tokens,
        "stream": stream,
        "braid": {"chunks": [chunk.id for chunk in request.chunks]},
    }


def check(load: serving.Workload, port: int) -> Row:
    """The same requests by both ways, one after another.

    Raises:
        SystemExit: an answer differs.
    """
    tokens, requests = load.shape.short_answer_tokens, load.some(load.shape.checked, seed=1)
    for request in requests:
        want = load.braid.compose(request.chunks).ask(request.question, max_new_tokens=tokens)
        body = body_of(request, tokens, stream=False)
        got = httpx.post(f"http://127.0.0.1:{port}{PATH}", json=body, timeout=600).json()
        text = got["choices"][0]["message"]["content"]
        if (text, got["usage"]["completion_tokens"]) != (want.text, len(want.token_ids)):
            raise SystemExit("an answer over HTTP must be the SDK's: nothing is measured")
    return {"requests": len(requests), "tokens": tokens, "equal": len(requests)}


def over_http(load: serving.Workload, port: int, callers: int) -> Row:
    """A closed loop of callers in a process of their own."""
    shape = load.shape
    requests = islice(load.requests(seed=100 + callers), shape.prepared)
    asked = {
        "host": "127.0.0.1",
        "port": port,
        "path": PATH,
        "callers": callers,
        "seconds": shape.seconds,
        "bodies": [body_of(each, shape.answer_tokens) for each in requests],
    }
    program = Path(__file__).with_name("http_callers.py")
    done = subprocess.run(
        [sys.executable, "-P", program], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True
    )
    return row_of([serving.Trace(**{**each, "answer": None}) for each in json.loads(done.stdout)])


def row_of(traces: list[serving.Trace]) -> Row:
    """What was seen of one loop."""
    done = [trace for trace in traces if not trace.error]
    elapsed = max(trace.ended for trace in traces) - min(trace.started for trace in traces)
    return {
        "requests": len(done),
        "failed": len(traces) - len(done),
        "requests_per_s": len(done) / elapsed,
        "first_token_ms": serving.percentiles([each.pieces[0] - each.started for each in done]),
    }


def in_process(load: serving.Workload, callers: int) -> Row:
    """The same loop over the SDK."""
    going = serving.until(load.shape.seconds)
    requests = load.ready(seed=100 + callers)
    traces = asyncio.run(serving.closed(load.client, requests, callers, load.shape.answer_tokens, going))
    return row_of(traces)


def both(load: serving.Workload, port: int, callers: int) -> Row:
    """The two in turns."""
    turns = [in_process(load, callers), *(over_http(load, port, callers) for _ in range(2)), in_process(load, callers)]
    sdk, http = (turns[0], turns[3]), (turns[1], turns[2])
    row: Row = {"callers": callers, "failed": sum(each["failed"] for each in turns)}
    for name, two in (("sdk", sdk), ("http", http)):
        row[name] = {
            "requests": sum(each["requests"] for each in two),
            "requests_per_s": fmean(each["requests_per_s"] for each in two),
            "first_token_ms": {p: fmean(each["first_token_ms"][p] for each in two) for p in ("p50", "p99")},
        }
    row["of_sdk"] = row["http"]["requests_per_s"] / row["sdk"]["requests_per_s"]
    row["p99_over_p50"] = row["http"]["first_token_ms"]["p99"] / row["http"]["first_token_ms"]["p50"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--callers", type=int, nargs="+", help="of the closed loops; default: 1 8 64 256, on a CPU 1 8")
    parser.add_argument("--seconds", type=float, help="in which the requests of a loop start; default: 5, on a CPU 20")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoint and store, 22 GB; default: the system's")
    options = parser.parse_args()
    shape = serving.ON_GPU if options.device == "cuda" else serving.ON_CPU
    shape = serving.quick(shape) if options.quick else shape
    shape = replace(shape, callers=tuple(options.callers or shape.callers), seconds=options.seconds or shape.seconds)
    report: Row = {
        "command": " ".join(["python benchmarks/serving_http.py", *serving.without_folders(sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "versions": serving.versions(),
        "model": f"Qwen3-{shape.geometry} geometry, random weights, bfloat16",
        "required": REQUIRED,
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=options.scratch) as parent:
        folder = Path(parent, "checkpoint")
        save_checkpoint(folder, shape.geometry, options.device, telling=True)
        with serving.opened(folder, options.device, shape.pool_bytes) as braid:
            load = serving.Workload(braid, shape, folder)
            for request in load.some(4 * shape.checked, seed=5):
                braid.ask(request.question, chunks=request.chunks, max_new_tokens=1)
            with server(braid) as port:
                report["check"] = check(load, port)
                for callers in shape.callers:
                    report["rows"].append(row := both(load, port, callers))
                    sys.stderr.write(f"{json.dumps(row)}\n")
                    if options.out:
                        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
