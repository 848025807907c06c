"""First tokens on the CPU: a composed context from disk and resident, against a full prefill by transformers.

    python benchmarks/ttft.py                     # Qwen3-0.6B geometry, random weights, bfloat16; some 15 minutes
    python benchmarks/ttft.py --chunks 4 --out x.json

Each number of chunks (128 tokens each, behind a system prompt) is measured in three processes of its own, one after the
other on an otherwise idle machine: one registers; one is fresh, reloads and asks; one holds everything resident. The
last one runs transformers beside it on the same ids, after checking that the logits of `exact` agree. Files lie in the
page cache in the fresh process, since the process before has just written them; the results say so.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import transformers
from random_model import question_of, save_checkpoint, text_of
from transformers import AutoModelForCausalLM

from braidsdk import Braid, Chunk

CHUNK_TOKENS = 128
QUESTION_TOKENS = 32
DECODE_TOKENS = 32
SYSTEM = "You answer questions from the documents."


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    started = perf_counter()
    run()
    return perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest, in the values' unit."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def register(folder: Path, store: Path, chunks: int) -> dict[str, object]:
    """Register everything in one call, the store's writing included."""
    with Braid(folder, store=store, device="cpu") as braid:
        texts = [text_of(braid, CHUNK_TOKENS, seed) for seed in range(chunks)]
        rules = braid.register_system(SYSTEM, name="rules")
        braid.register(text_of(braid, CHUNK_TOKENS, 10_000), anchor=rules)  # first touches and lazy set-up
        seconds = timed(lambda: braid.register_many(texts, anchor=rules, progress=False))
        return {"tokens": chunks * CHUNK_TOKENS, "seconds": seconds}


def fresh(folder: Path, store: Path, chunks: int) -> dict[str, object]:
    """A process that has just opened: its first question, every entry read from disk."""
    with Braid(folder, store=store, device="cpu") as braid:
        context = braid.compose(documents(braid, chunks))
        asked = question_of(context, QUESTION_TOKENS)
        assert all(row.where == "store" for row in context.explain().chunks)
        answer = context.ask(asked, max_new_tokens=1)
        assert answer.usage.cached_tokens == len(context.input_ids)
        timings = answer.timings
        return {"first_token_ms": timings.first_token_ms, "load_ms": timings.load_ms, "token_ids": answer.token_ids}


def resident(folder: Path, store: Path, chunks: int) -> dict[str, object]:
    """Everything resident, and transformers beside it on the same ids."""
    with Braid(folder, store=store, device="cpu") as braid, torch.inference_mode():
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=braid.dtype, attn_implementation="sdpa"
        )
        model.eval()
        chosen = documents(braid, chunks)
        context = braid.compose(chosen)
        asked = question_of(context, QUESTION_TOKENS)
        prompt = context.prompt_ids(asked)
        ids = torch.tensor([prompt])

        def prefill() -> torch.Tensor:
            return model(ids, logits_to_keep=1).logits[0, -1]

        theirs = prefill().float()
        exact = braid.compose(chosen, mode="exact").next_token_logits(asked)
        error = float((exact - theirs).norm() / theirs.norm())
        assert error < 0.05, f"exact and a full prefill differ by {error:.3f} of the logits' norm: nothing is measured"

        repeats = 3 if chunks > 16 else 5
        full = [timed(lambda: int(prefill().argmax())) * 1e3 for _ in range(repeats)]
        ours = [context.ask(asked, max_new_tokens=1).timings.first_token_ms for _ in range(7)]
        answer = context.ask(asked, max_new_tokens=1)
        assert answer.usage.cached_tokens == len(context.input_ids)

        rates = [context.ask(asked, max_new_tokens=DECODE_TOKENS).timings.decode_tokens_per_s for _ in range(3)]
        their_rates = []
        for _ in range(3):
            cache = model(ids, logits_to_keep=1).past_key_values
            token = ids[:, -1:]
            started = perf_counter()
            for _ in range(DECODE_TOKENS - 1):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            their_rates.append((DECODE_TOKENS - 1) / (perf_counter() - started))
        documents_only = torch.tensor([prompt[: chunks * CHUNK_TOKENS]])
        their_prefill = [timed(lambda: model(documents_only, logits_to_keep=1)) for _ in range(repeats)]
        return {
            "token_ids": answer.token_ids,
            "prompt_tokens": len(prompt),
            "logit_error": error,
            "full_prefill_ms": spread(full),
            "resident_ms": spread(ours),
            "decode_tokens_per_s": spread(rates),
            "transformers_decode_tokens_per_s": spread(their_rates),
            "transformers_prefill_s": spread(their_prefill),
        }


def documents(braid: Braid, chunks: int) -> list[Chunk]:
    """The registered chunks in an order of their own, behind the system prompt."""
    rules, _, *rest = braid.chunks.list()
    rest = rest[:chunks]
    random.Random(1).shuffle(rest)
    return [rules, *rest]


def measure(folder: Path, chunks: int, fresh_runs: int) -> dict[str, object]:
    """One number of chunks, each step in a process of its own."""
    with tempfile.TemporaryDirectory() as store:
        steps = {}
        for step, runs in (("register", 1), ("fresh", fresh_runs), ("resident", 1)):
            command = [sys.executable, __file__, "--step", step, "--model", str(folder), "--store", store]
            command += ["--chunks", str(chunks)]
            steps[step] = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(runs)
            ]
    (registered,), opened, (held,) = steps["register"], steps["fresh"], steps["resident"]
    first = held.pop("token_ids")
    assert all(run["token_ids"] == first for run in opened), "a reloaded context gave another token than a resident one"
    full = held["full_prefill_ms"]["median"]
    from_disk = spread([run["first_token_ms"] for run in opened])
    return {
        "chunks": chunks,
        **held,
        "from_disk_ms": from_disk,
        "load_ms": spread([run["load_ms"] for run in opened]),
        "register_s": registered["seconds"],
        "ratios": {
            "from_disk": full / from_disk["median"],
            "resident": full / held["resident_ms"]["median"],
            "register_over_prefill": registered["seconds"] / held["transformers_prefill_s"]["median"],
            "decode": held["decode_tokens_per_s"]["median"] / held["transformers_decode_tokens_per_s"]["median"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Qwen3 checkpoint; default: random weights of 0.6B's geometry")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 4, 8, 32, 64], help=f"of {CHUNK_TOKENS} tokens")
    parser.add_argument("--fresh-runs", type=int, default=5, help="processes that reload")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ttft.json")
    parser.add_argument("--step", choices=["register", "fresh", "resident"], help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step = {"register": register, "fresh": fresh, "resident": resident}[options.step]
        sys.stdout.write(json.dumps(step(options.model, options.store, *options.chunks)))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or Path(made)
        if not options.model:
            save_checkpoint(folder)
        rows = []
        for chunks in options.chunks:
            rows.append(measure(folder, chunks, options.fresh_runs))
            sys.stderr.write(f"{chunks} chunks: {json.dumps(rows[-1]['ratios'])}\n")
    report = {
        "command": command_line(options),
        "model": "Qwen3-0.6B geometry, random weights, bfloat16" if not options.model else options.model.name,
        "chunk_tokens": CHUNK_TOKENS,
        "question_tokens": QUESTION_TOKENS,
        "page_cache": "warm: files read by the fresh process were written just before",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": sorted(rows, key=lambda row: row["chunks"]),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def command_line(options: argparse.Namespace) -> str:
    """The command that was run, a checkpoint by its folder's name."""
    chunks = " ".join(map(str, options.chunks))
    model = f" --model {options.model.name}" if options.model else ""
    return f"python benchmarks/ttft.py --chunks {chunks} --fresh-runs {options.fresh_runs}{model}"


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
