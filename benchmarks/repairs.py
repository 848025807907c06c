"""What repairs cost until the first token: each mode against full prefill and against `anchored`, resident chunks.

    python benchmarks/repairs.py                     # Qwen3-0.6B geometry, random weights, bfloat16; some 10 minutes
    python benchmarks/repairs.py --device cuda

16 chunks of 512 tokens behind a system prompt, and questions of 32. Full prefill is a prompt of which nothing is
cached, through the same kernels. The modes take turns in each round, on an otherwise idle machine, and each is asked
once before it is timed. Before that, `guided(1)` is compared with `exact`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from random_model import question_of, save_checkpoint, text_of
from ttft import cpu_name

from braidsdk import Braid, Context

CHUNKS, CHUNK_TOKENS, QUESTION_TOKENS = 16, 512, 32
MODES = (
    "anchored",
    "linked(16)",
    "guided(0.05)+shift",
    "guided(0.15)",
    "guided(0.15)+shift",
    "blended(0.15)",
)


def measure(braid: Braid, rounds: int) -> dict[str, object]:
    """All modes on one open model."""
    rules = braid.register_system("You answer questions from the documents.")
    texts = [text_of(braid, CHUNK_TOKENS, seed) for seed in range(CHUNKS)]
    chunks = [rules, *braid.register_many(texts, anchor=rules, progress=False)]
    contexts = {mode: braid.compose(chunks, mode=mode) for mode in MODES}
    asked = question_of(contexts["anchored"], QUESTION_TOKENS)
    first: dict[str, list[float]] = {mode: [] for mode in ("full prefill", *MODES)}
    budgets: dict[str, float] = {}
    check(braid.compose(chunks[:3], mode="exact"), braid.compose(chunks[:3], mode="guided(1)"), asked)
    for number in range(rounds + 1):
        for mode, context in contexts.items():
            answer = context.ask(asked, max_new_tokens=1)
            budgets[mode] = answer.usage.budget
            if number:
                first[mode].append(answer.timings.first_token_ms)
        if number:
            first["full prefill"].append(full_prefill_ms(braid, [text + f" {number}" for text in texts], asked))
        sys.stderr.write(f"round {number} of {rounds}\n")
    medians = {mode: statistics.median(values) for mode, values in first.items()}
    return {
        "prompt_tokens": len(contexts["anchored"].prompt_ids(asked)),
        "modes": {
            mode: {
                "first_token_ms": medians[mode],
                "least": min(values),
                "most": max(values),
                "budget": budgets.get(mode),
                "of_full_prefill": medians[mode] / medians["full prefill"],
                "of_anchored": medians[mode] / medians["anchored"],
            }
            for mode, values in first.items()
        },
    }


def check(exact: Context, repaired: Context, asked: str) -> None:
    """With all tokens computed again, a repair has to be full prefill."""
    truth, logits = (context.next_token_logits(asked) for context in (exact, repaired))
    error = float((truth - logits).norm() / truth.norm())
    assert error < 0.05, f"guided(1) and exact differ by {error:.3f} of the logits' norm: nothing is measured"


def full_prefill_ms(braid: Braid, texts: list[str], asked: str) -> float:
    """The first token over texts that nothing is cached of, as one chunk that is deleted again."""
    text = "\n".join(texts)
    chunk = braid.register(text)
    answer = braid.ask(asked, chunks=[chunk], mode="exact", keep=False, max_new_tokens=1)
    assert answer.usage.computed_tokens > CHUNKS * CHUNK_TOKENS
    braid.chunks.delete(chunk)
    return answer.timings.first_token_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="0.6B")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: results/repairs-DEVICE.json")
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / f"repairs-{options.device}.json"
    with tempfile.TemporaryDirectory() as made:
        save_checkpoint(Path(made) / "model", options.geometry)
        with Braid(Path(made) / "model", store=Path(made) / "store", device=options.device, dtype="bfloat16") as braid:
            measured = measure(braid, options.rounds)
            kernels = str(braid.kernels)
    report = {
        "benchmark": "repairs",
        "command": " ".join(["python benchmarks/repairs.py", *sys.argv[1:]]),
        "model": f"Qwen3-{options.geometry}'s geometry, random weights, bfloat16",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "cores": torch.get_num_threads(),
        "kernels": kernels,
        "chunks": CHUNKS,
        "chunk_tokens": CHUNK_TOKENS,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **measured,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
