"""A CPU's kernels and forms of weights side by side: start, first token, decode, memory, registering.

    python benchmarks/cpu.py                    # Qwen3-0.6B geometry, random weights, bfloat16; some 5 minutes
    python benchmarks/cpu.py --model FOLDER --out x.json

16 chunks of 128 tokens behind a system prompt, and questions of 32. Each way has a store of its own. In each round it
runs in two processes: one opens the store, composes what it holds, and gives a first token, timed from the start of the
interpreter; then it decodes. The ways take turns in each round, on an otherwise idle machine. Files lie in the page
cache. Anonymous memory is that of the process after its first token, as Linux counts it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, time

WAYS = {
    "torch, bfloat16": ("torch", "auto"),
    "C kernels, bfloat16": ("native", "auto"),
    "C kernels, int8": ("native", "int8"),
}
CHUNKS, CHUNK_TOKENS, QUESTION_TOKENS, DECODE_TOKENS = 16, 128, 32, 64


def register(folder: Path, store: Path, kernels: str, weights: str) -> dict[str, object]:
    """Register everything in one call, the store's writing included."""
    from random_model import text_of

    from braidsdk import Braid

    with Braid(folder, store=store, device="cpu", dtype="bfloat16", kernels=kernels, weights=weights) as braid:
        texts = [text_of(braid, CHUNK_TOKENS, seed) for seed in range(CHUNKS)]
        rules = braid.register_system("You answer questions from the documents.")
        braid.register(text_of(braid, CHUNK_TOKENS, 10_000), anchor=rules, name="first")  # first touches
        started = perf_counter()
        braid.register_many(texts, anchor=rules, progress=False)
        return {"registering_tokens_per_s": CHUNKS * CHUNK_TOKENS / (perf_counter() - started)}


def answer(folder: Path, store: Path, kernels: str, weights: str, born: float) -> dict[str, object]:
    """A process that opens the store and asks; `born` is when it was started, seconds since the epoch."""
    from braidsdk import Braid

    with Braid(folder, store=store, device="cpu", dtype="bfloat16", kernels=kernels, weights=weights) as braid:
        context = braid.compose([chunk for chunk in braid.chunks.list() if chunk.name != "first"])
        context.ask("What does the report say of it?", max_new_tokens=1)
        start_s, anonymous = time() - born, anonymous_bytes()
        from random_model import question_of

        asked, first, rates = question_of(context, QUESTION_TOKENS), [], []
        for _ in range(3):
            timings = context.ask(asked, max_new_tokens=DECODE_TOKENS).timings
            first.append(timings.first_token_ms)
            rates.append(timings.decode_tokens_per_s)
        return {
            "start_s": start_s,
            "anonymous_mib": anonymous / 2**20,
            "first_token_ms": statistics.median(first),
            "decode_tokens_per_s": statistics.median(rates),
            "kernels": str(braid.kernels),
        }


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("Linux does not say how much memory is anonymous")


def child(step: str, folder: Path, store: Path, way: str) -> dict[str, object]:
    command = [sys.executable, __file__, "--step", step, "--model", str(folder), "--store", str(store), "--way", way]
    run = subprocess.run([*command, "--born", str(time())], check=True, stdout=subprocess.PIPE)
    found: dict[str, object] = json.loads(run.stdout)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest, in the values' unit."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: random weights of Qwen3-0.6B's geometry")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--step", choices=["register", "answer"], help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--born", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        place = (options.model, options.store, *WAYS[options.way])
        found = register(*place) if options.step == "register" else answer(*place, options.born)
        sys.stdout.write(json.dumps(found))
        return
    runs: dict[str, list[dict[str, object]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or Path(made) / "model"
        if not options.model:
            from random_model import save_checkpoint

            save_checkpoint(folder, telling=True)  # answers do not end early
        stores = {way: Path(made) / str(place) for place, way in enumerate(WAYS)}
        registered = {way: child("register", folder, store, way) for way, store in stores.items()}
        for _ in range(options.rounds):
            for way, store in stores.items():
                runs[way].append(child("answer", folder, store, way))
                sys.stderr.write(f"{way}: {json.dumps(runs[way][-1])}\n")
    numbers = ("start_s", "anonymous_mib", "first_token_ms", "decode_tokens_per_s")
    report = {
        "benchmark": "cpu",
        "command": f"python benchmarks/cpu.py --rounds {options.rounds}",
        "model": "Qwen3-0.6B geometry, random weights" if not options.model else options.model.name,
        **machine(),
        "prompt": {"chunks": CHUNKS, "chunk_tokens": CHUNK_TOKENS, "question_tokens": QUESTION_TOKENS},
        "ways": {
            way: {
                "kernels": runs[way][0]["kernels"],
                **registered[way],
                **{name: spread([float(run[name]) for run in runs[way]]) for name in numbers},  # type: ignore[arg-type]
            }
            for way in WAYS
        },
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, object]:
    """The processor, and the versions of what runs on it."""
    import torch
    from ttft import cpu_name

    from braidsdk.kernels import native

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "level": native.level().name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    main()
