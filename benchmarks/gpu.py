"""Answers on one GPU as a user gets them: bfloat16, random weights, and transformers beside them in the same run.

    python benchmarks/gpu.py --out gpu.json

Times are the host's clock around public calls. Logits are compared with those of transformers before anything is
timed. A limit is the bytes that must be read (weights and KV) over the bandwidth of a device copy, measured first.
Decoding is timed with weights in int8 too.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
import transformers
import triton
from batch_dependence import batch_dependence
from random_model import GEOMETRIES, question_of, save_checkpoint, text_of, token_bytes
from timing import Row, copy_bytes_per_s, seconds, spread
from transformers import AutoModelForCausalLM
from transformers_peer import compiled, eager
from warm_up import processes

from braidsdk import Braid, Chunk, Context
from braidsdk.kernels.weight import GROUP

CHUNK_TOKENS, ANCHOR_TOKENS, QUESTION_TOKENS, OWN_TOKENS, SHORT_TOKENS = 512, 256, 32, 64, 200
REQUESTS = 64
SHORT_SYSTEM = "You answer questions."


class Bench:
    """An open Braid on Triton's kernels, or an error, and the texts that it is asked about."""

    def __init__(self, braid: Braid, geometry: str) -> None:
        self.braid = braid
        self.token_bytes = token_bytes(geometry)
        self.rng = random.Random(0)
        self.short = braid.register_system(SHORT_SYSTEM)
        self.anchor = self.system(0)

    def system(self, seed: int) -> Chunk:
        """A system prompt of about `ANCHOR_TOKENS` tokens, its control tokens aside."""
        return self.braid.register_system(text_of(self.braid, ANCHOR_TOKENS, 1000 + seed))

    def documents(self, count: int) -> list[Chunk]:
        """Chunks that nothing was computed of yet."""
        return self.braid.register_many(
            [text_of(self.braid, CHUNK_TOKENS, seed) for seed in range(count)], progress=False
        )

    def composed(self, docs: list[Chunk]) -> Context:
        """A ready context of these chunks, in an order of its own."""
        context = self.braid.compose([self.anchor, *self.rng.sample(docs, len(docs))], keep=False)
        context.prepare()
        return context

    def question(self, tokens: int = QUESTION_TOKENS) -> str:
        """A question whose tail is exactly so many tokens."""
        return question_of(self.braid.compose([self.short]), tokens)

    def decode_rate(self, context: Context, tokens: int) -> float:
        """Tokens per second after the first, on the caller's clock."""
        started = perf_counter()
        answer = context.ask(self.question(), max_new_tokens=tokens)
        total = perf_counter() - started
        if len(answer.token_ids) != tokens:
            raise SystemExit("the random model ended its answer early")
        return (tokens - 1) / (total - answer.timings.first_token_ms / 1e3)


def check(bench: Bench, model: torch.nn.Module, docs: list[Chunk]) -> Row:
    """Our logits against those of transformers, and the ids that graphs choose against our logits."""
    asked = bench.question()
    context = bench.braid.compose([bench.anchor, *docs[:4]], mode="exact")
    ours = context.next_token_logits(asked)
    with torch.inference_mode():
        theirs = model(torch.tensor([context.prompt_ids(asked)], device="cuda"), logits_to_keep=1).logits[0, -1].float()
    error = float((ours - theirs.cpu()).norm() / theirs.norm())
    if not error < 0.05:
        raise SystemExit(f"logits differ from those of transformers by {error:.3f} of their norm: nothing is measured")
    for some in (docs[:1], docs[:16], docs):
        composed = bench.composed(some)
        best = composed.next_token_logits(asked).topk(2)
        (token,) = composed.ask(asked, max_new_tokens=1).token_ids
        if token != int(best.indices[0]) and float(best.values.diff().abs()) > 0.05:
            raise SystemExit(f"a graph chose token {token}, not {int(best.indices[0])}: nothing is measured")
    return {"exact_logits_error": error}


def ours(bench: Bench, docs: list[Chunk], weight_bytes: float, bytes_per_s: float) -> Iterator[Row]:
    """Single answers, batches, registering."""

    def limit(tokens: int, requests: int = 1) -> float:
        return requests * bytes_per_s / (weight_bytes + tokens * bench.token_bytes)

    short = bench.braid.compose([bench.short])
    contexts = {"short": (short, 48), "8k": (bench.composed(docs[:16]), 385), "32k": (bench.composed(docs), 385)}
    for name, (context, tokens) in contexts.items():
        bench.decode_rate(context, tokens)
        rates = [bench.decode_rate(context, tokens) for _ in range(5)]
        length = len(context.input_ids) + QUESTION_TOKENS + tokens // 2
        yield {"what": f"decode, 1 request, {name}", "limit": limit(length), **spread(rates, "tokens/s")}
    for name, some in (("8k", docs[:16]), ("32k", docs)):
        orders = [bench.composed(some) for _ in range(16)]
        orders[0].ask(bench.question(), max_new_tokens=1)
        times = [each.ask(bench.question(), max_new_tokens=1).timings.first_token_ms for each in orders]
        floor = 1e3 / limit(len(orders[0].input_ids))
        yield {"what": f"first token, any order, {name}", "limit": floor, **spread(times, "ms")}
        times = [orders[0].ask(bench.question(), max_new_tokens=1).timings.first_token_ms for _ in range(16)]
        yield {"what": f"first token, same order again, {name}", "limit": floor, **spread(times, "ms")}
    anchors = [bench.system(1 + number) for number in range(4)]
    rates = []
    for anchor in anchors:
        bench.braid.compose([anchor]).prepare()
        context = bench.braid.compose([anchor, *docs], keep=False)
        rates.append(len(docs) * CHUNK_TOKENS / seconds(context.prepare))
    yield {"what": f"registering {len(docs)} x {CHUNK_TOKENS}", **spread(rates[1:], "tokens/s")}
    requests = [(bench.composed(docs[:16]), bench.question(OWN_TOKENS)) for _ in range(REQUESTS)]
    steps = 128
    bench.braid.ask_many(requests, max_new_tokens=2)
    firsts = [seconds(lambda: bench.braid.ask_many(requests, max_new_tokens=2)) for _ in range(3)]
    wholes = [seconds(lambda: bench.braid.ask_many(requests, max_new_tokens=2 + steps)) for _ in range(3)]
    rates = [REQUESTS * steps / (whole - statistics.median(firsts)) for whole in wholes]
    seen = 16 * CHUNK_TOKENS + ANCHOR_TOKENS + REQUESTS * (OWN_TOKENS + steps // 2)
    name = f"decode, {REQUESTS} requests, one 8k, own orders"
    yield {"what": name, "limit": limit(seen, REQUESTS), **spread(rates, "tokens/s")}


def decoding(braid: Braid, geometry: str, weights: str, bytes_per_s: float, tokens: int | None = None) -> Row:
    """One request: a short one with so many tokens of answer, or one over 1,024 tokens of context in the mean."""
    bench = Bench(braid, geometry)
    context = braid.compose([bench.short]) if tokens else bench.composed(bench.documents(1))
    tokens = tokens or 2 * (1024 - len(context.input_ids) - QUESTION_TOKENS)
    length = len(context.input_ids) + QUESTION_TOKENS + tokens // 2
    bench.decode_rate(context, tokens)
    rates = [bench.decode_rate(context, tokens) for _ in range(5)]
    limit = bytes_per_s / (weight_bytes(geometry, weights) + length * bench.token_bytes)
    return {"what": geometry, "weights": weights, "context": length, "limit": limit, **spread(rates, "tokens/s")}


def profile(bench: Bench, context: Context) -> list[Row]:
    """Kernels of some decoded tokens by their share of the GPU's time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    bench.decode_rate(context, 17)
    with record(activities=[ProfilerActivity.CUDA]) as found:
        bench.decode_rate(context, 65)
    kernels = sorted(found.key_averages(), key=lambda each: -each.self_device_time_total)
    whole = sum(each.self_device_time_total for each in kernels)
    return [
        {"kernel": each.key[:60], "calls": each.count, "share": each.self_device_time_total / whole}
        for each in kernels[:12]
    ]


def theirs(bench: Bench, model: torch.nn.Module, docs: list[Chunk], compiled_slots: list[int]) -> Iterator[Row]:
    """transformers over the same ids."""
    prompts = {
        "short": bench.braid.compose([bench.short]),
        "8k": bench.composed(docs[:16]),
        "32k": bench.composed(docs),
    }
    ids = {
        name: torch.tensor([context.prompt_ids(bench.question())], device="cuda") for name, context in prompts.items()
    }
    for name, prompt in ids.items():
        yield from eager(model, prompt, QUESTION_TOKENS, name)
    for slots in compiled_slots:
        yield compiled(model, ids["short"], slots)


@contextmanager
def checkpoint(geometry: str, scratch: Path | None) -> Iterator[Path]:
    """The folder of a random checkpoint of a geometry, in a folder that is removed."""
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        folder = Path(parent, "checkpoint")
        save_checkpoint(folder, geometry, "cuda")
        torch.cuda.empty_cache()
        yield folder
    torch.cuda.empty_cache()


def opened(folder: Path, weights: str = "auto") -> Braid:
    """A checkpoint, open on Triton's kernels."""
    store = folder.with_name(f"store-{weights}")
    return Braid(folder, store=store, device="cuda", dtype="bfloat16", kernels="triton", weights=weights)


def weight_bytes(geometry: str, weights: str = "auto") -> float:
    """Read for one token: all weights but an embedding that is not the head."""
    shape = GEOMETRIES[geometry]
    hidden, inner, layers = (int(shape[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    q, kv = (int(shape[name]) * 128 for name in ("num_attention_heads", "num_key_value_heads"))
    each = 2 if weights == "auto" else 1 + 4 / GROUP
    return each * (layers * hidden * (2 * q + 2 * kv + 3 * inner) + int(shape["vocab_size"]) * hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--scratch", type=Path, help="folder for checkpoints and stores, 25 GB with 8B; default: the system's"
    )
    parser.add_argument("--geometries", nargs="*", default=["1.7B", "4B", "8B"], help="decoded at 1k beside 0.6B")
    parser.add_argument(
        "--compiled-slots", type=int, nargs="*", default=[2048], help="of transformers' static cache, compiled"
    )
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' times out")
    options = parser.parse_args()
    bytes_per_s = copy_bytes_per_s()
    torch.cuda.empty_cache()
    report: Row = {
        "command": "python benchmarks/gpu.py",
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "copy_bytes_per_s": bytes_per_s,
        "warm_up": [],
        "rows": [],
        "transformers": [],
        "geometries": [],
    }

    def show(part: str, value: object) -> None:
        """Put a part into the report, or a row into a part that is a list, and keep the report so far."""
        if isinstance(report.get(part), list):
            report[part].append(value)
        else:
            report[part] = value
        sys.stderr.write(f"{part}: {json.dumps(value)}\n")
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")

    with checkpoint("0.6B", options.scratch) as folder:
        for row in processes(folder, options.scratch):
            show("warm_up", row)
        with opened(folder) as braid:
            bench = Bench(braid, "0.6B")
            docs = bench.documents(64)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
            model.eval().cuda()
            show("check", check(bench, model, docs))
            for row in ours(bench, docs, weight_bytes("0.6B"), bytes_per_s):
                show("rows", row)
            show("profile", profile(bench, bench.composed(docs[:16])))
            braid.warm_up(requests=REQUESTS, progress=False)
            show("launches", braid.kernels.launches())
            show("batch", batch_dependence(braid, folder, folder.with_name("store-float32")))
            if not options.no_transformers:
                for row in theirs(bench, model, docs, options.compiled_slots):
                    show("transformers", row)
            del model
        for weights in ("auto", "int8"):
            with opened(folder, weights) as braid:
                show("geometries", decoding(braid, "0.6B", weights, bytes_per_s, SHORT_TOKENS))
    for geometry in options.geometries:
        with checkpoint(geometry, options.scratch) as folder:
            for weights in ("auto", "int8"):
                with opened(folder, weights) as braid:
                    show("geometries", decoding(braid, geometry, weights, bytes_per_s))


if __name__ == "__main__":
    main()
