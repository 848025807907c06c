"""Many callers at once, through the public calls of one `Braid`: random weights, bfloat16, greedy answers.

    python benchmarks/serving.py --out serving.json                     # on a GPU, if there is one; some 4 minutes
    python benchmarks/serving.py --only lone                            # one part; a comma between several
    python benchmarks/serving.py --device cpu --out serving-cpu.json    # some 10 minutes on two cores

Requests: each draws some of the corpus's chunks by Zipf(1.0), no chunk twice, puts them in a random order behind one
system prompt, and asks a question of its own. Seeds are fixed. Every answer has the same number of tokens.

Parts, of which `--only` chooses:

    resident   callers in a closed loop (each asks again as soon as it has its answer), and Poisson arrivals at half of
               the best rate of those loops; the whole corpus in memory
    third      the same with a pool that holds a third of the corpus; the rest is in the store
    aask8      passes of the model for 8 `aask` at once, and for one `ask_many` of the same 8
    threads    tokens/s of threads that call `ask`, and of one `ask_many` of the same requests, in turns
    lone       decode rate of a caller that is alone
    register   time between tokens of running answers while texts are registered, and without that
    join       host time of a join and of a leave in a running batch

What is measured: a caller's own clock. A request starts at its call of `Braid.astream`, so composing and queueing
count. Its first token is there when the first piece of text is; time between tokens is that between two pieces of one
answer. Nearly every token of this checkpoint has a text of its own; `pieces_per_token` says how nearly. A token without
one is counted with the next. requests/s and tokens/s are those of all finished requests from the first start to the
last end: no request starts after `seconds`, and all that run then are waited for. `tokens_per_step` is the mean number
of tokens in a pass of the model: one for each answer that runs, and those of questions. `load_ms` is the mean time that
a request spent on reading the store.

Before anything is measured some requests are answered together and each alone. Answers must be equal, or part at a
token where transformers, over the same cache, finds both ids equally likely but for rounding.

To compare two versions, run this same file with the Python of each in alternation, on an otherwise idle machine.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
import transformers
from random_model import question_of, save_checkpoint, text_of
from timing import Row, spread
from transformers import AutoModelForCausalLM
from ttft import cpu_name

from braidsdk import Answer, Braid, BraidError, Chunk, Context

PARTS = ("resident", "third", "aask8", "threads", "lone", "register", "join")
SYSTEM = "You answer questions."
QUESTIONS = 64
TIE = 0.15
"""In standard deviations of the logits: several times what bfloat16 adds to a difference of two, and about a third of
what another chunk in the context changes."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one run. Tokens, unless the name says otherwise.

    Attributes:
        geometry: of the model, a key of `GEOMETRIES`.
        chunks, chunk_tokens, system_tokens: the corpus.
        drawn: chunks of one request.
        question_tokens, answer_tokens: of one request.
        callers: of the closed loops.
        seconds: in which requests of one closed loop start, or Poisson arrivals come.
        prepared: requests that are made before a load begins.
        checked: requests of the first check.
        short_answer_tokens: of the check and of `aask8`.
        threads, thread_tokens, rounds: callers of `threads`, their answers, and how often each side is timed.
        lone_chunks, lone_tokens, lone_answers: longest context of `lone`, and its answers.
        running, running_tokens, registered: callers of `register`, their answers, and texts that are registered.
        pool_bytes: room for the corpus and for all that runs.
    """

    geometry: str = "0.6B"
    chunks: int = 256
    chunk_tokens: int = 512
    system_tokens: int = 256
    drawn: int = 8
    question_tokens: int = 32
    answer_tokens: int = 64
    callers: tuple[int, ...] = (1, 8, 64, 256)
    seconds: float = 5.0
    prepared: int = 2500
    checked: int = 8
    short_answer_tokens: int = 16
    threads: int = 64
    thread_tokens: int = 64
    rounds: int = 3
    lone_chunks: int = 16
    lone_tokens: int = 257
    lone_answers: int = 5
    running: int = 32
    running_tokens: int = 256
    registered: int = 64
    pool_bytes: int = 34 << 30


ON_GPU = Shape()
ON_CPU = Shape(
    chunks=32,
    chunk_tokens=128,
    system_tokens=64,
    drawn=4,
    callers=(1, 8),
    seconds=20.0,
    prepared=50,
    checked=2,
    short_answer_tokens=8,
    threads=8,
    thread_tokens=8,
    rounds=2,
    lone_chunks=32,
    lone_tokens=33,
    lone_answers=3,
    running=4,
    running_tokens=64,
    registered=16,
    pool_bytes=3 << 30,
)


def quick(shape: Shape) -> Shape:
    """The same in small, to see that it runs; its numbers mean nothing."""
    return replace(
        shape,
        geometry="0.6B, 4 layers",
        chunks=24,
        chunk_tokens=64,
        system_tokens=64,
        drawn=2,
        answer_tokens=4,
        callers=(1, 4),
        seconds=1.0,
        prepared=50,
        checked=2,
        short_answer_tokens=4,
        threads=4,
        thread_tokens=3,
        rounds=1,
        lone_chunks=4,
        lone_tokens=5,
        lone_answers=2,
        running=2,
        running_tokens=4,
        registered=2,
        pool_bytes=3 << 30,
    )


@dataclass(frozen=True)
class Request:
    """What one caller asks.

    Attributes:
        chunks: the system prompt and what was drawn, in order.
        question: its text.
    """

    chunks: tuple[Chunk, ...]
    question: str


@dataclass(frozen=True)
class Trace:
    """One request as its caller saw it; times by `perf_counter`.

    Attributes:
        started: when the call was made.
        pieces: when each piece of text came.
        ended: when the answer, or the error, was there.
        answer: what came of it.
        error: the name of what it failed with.
    """

    started: float
    pieces: list[float]
    ended: float
    answer: Answer | None = None
    error: str | None = None


Client = Callable[[Request, int], Awaitable[Trace]]
"""Makes one request, with a number of tokens to answer; the only part that knows how the model is reached."""


def in_process(braid: Braid) -> Client:
    """A client that calls `Braid.astream`."""

    async def call(request: Request, tokens: int) -> Trace:
        started, pieces = perf_counter(), list[float]()
        stream = braid.astream(request.question, chunks=request.chunks, max_new_tokens=tokens)
        try:
            async for _ in stream:
                pieces.append(perf_counter())
        except BraidError as error:
            return Trace(started, pieces, perf_counter(), error=type(error).__name__)
        return Trace(started, pieces, perf_counter(), whole(stream.answer, tokens))

    return call


def whole(answer: Answer, tokens: int) -> Answer:
    """An answer that has its tokens.

    Raises:
        SystemExit: it ended early.
    """
    if len(answer.token_ids) != tokens:
        raise SystemExit(f"an answer must have {tokens} tokens; one has {len(answer.token_ids)}")
    return answer


class Workload:
    """A Braid with its registered corpus, and the requests on it."""

    def __init__(self, braid: Braid, shape: Shape, folder: Path) -> None:
        self.braid, self.shape, self.folder = braid, shape, folder
        self.client = in_process(braid)
        self.system = braid.register_system(text_of(braid, shape.system_tokens, 1_000_000))
        self.corpus = self.register(self.texts(range(shape.chunks)))
        bare = braid.compose([self.system])
        self.questions = [question_of(bare, shape.question_tokens, seed) for seed in range(QUESTIONS)]
        weights = 1 / np.arange(1, shape.chunks + 1)
        self.chances = weights / weights.sum()

    def texts(self, seeds: range) -> list[str]:
        """Of the corpus's length, a text per seed."""
        return [text_of(self.braid, self.shape.chunk_tokens, seed) for seed in seeds]

    def register(self, texts: list[str]) -> list[Chunk]:
        """Texts behind the system prompt."""
        return self.braid.register_many(texts, anchor=self.system, progress=False)

    def requests(self, seed: int) -> Iterator[Request]:
        """Without end; the same for the same seed."""
        rng = np.random.default_rng(seed)
        while True:
            drawn = rng.permutation(rng.choice(self.shape.chunks, self.shape.drawn, replace=False, p=self.chances))
            yield Request((self.system, *(self.corpus[index] for index in drawn)), str(rng.choice(self.questions)))

    def ready(self, seed: int) -> Iterator[Request]:
        """The same, as many as a closed loop may need made beforehand: drawing one takes the interpreter long."""
        source = self.requests(seed)
        return chain(list(islice(source, self.shape.prepared)), source)

    def some(self, count: int, seed: int) -> list[Request]:
        """The first of them."""
        return [request for request, _ in zip(self.requests(seed), range(count), strict=False)]

    def contexts(self, count: int, seed: int) -> list[tuple[Context, str]]:
        """The same for `Context.ask` and `ask_many`, with everything computed or loaded that they need."""
        pairs = [(self.braid.compose(each.chunks), each.question) for each in self.some(count, seed)]
        for context, _ in pairs:
            context.prepare()
        return pairs


# correctness


def check(load: Workload) -> Row:
    """Answers to requests at once, against those of each alone.

    Raises:
        SystemExit: they differ by more than rounding, or all are the same, so that they could not differ.
    """
    tokens, requests = load.shape.short_answer_tokens, load.some(load.shape.checked, seed=1)
    traces = asyncio.run(at_once(load.client, requests, tokens))
    if failed := [trace.error for trace in traces if trace.error]:
        raise SystemExit(f"requests of the check must be answered; got {failed[0]}: nothing is measured")
    together = [trace.answer.token_ids for trace in traces if trace.answer]
    alone, ties = [], 0
    for request, others in zip(requests, together, strict=True):
        context = load.braid.compose(request.chunks)
        alone.append(whole(context.ask(request.question, max_new_tokens=tokens), tokens).token_ids)
        if alone[-1] != others:
            if not is_tie(load, context, request.question, alone[-1], others):
                raise SystemExit("an answer among others must be that of the same question alone: nothing is measured")
            ties += 1
    if len(set(alone)) < len(requests):
        raise SystemExit("different requests must have different answers, or the check shows nothing")
    return {"requests": len(requests), "tokens": tokens, "equal": len(requests) - ties, "parted_at_a_tie": ties}


@torch.inference_mode()
def is_tie(load: Workload, context: Context, question: str, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two answers part at ids that transformers, over the same cache, finds equally likely within `TIE`."""
    split = next(index for index, (one, other) in enumerate(zip(first, second, strict=True)) if one != other)
    device = load.braid.device
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(load.folder, dtype=torch.bfloat16).eval().to(device)
    ids = torch.tensor([(*context.prompt_ids(question), *first[:split])], device=device)[:, len(context.input_ids) :]
    logits = model(ids, past_key_values=context.to_transformers_cache(model.config)).logits[0, -1].float()
    least = min(float(logits[first[split]]), float(logits[second[split]]))
    return least > float(logits.max() - TIE * logits.std())


# load


async def at_once(client: Client, requests: Sequence[Request], tokens: int) -> list[Trace]:
    """All of them start together."""
    return await asyncio.gather(*(client(request, tokens) for request in requests))


async def closed(
    client: Client, requests: Iterator[Request], callers: int, tokens: int, going: Callable[[], bool]
) -> list[Trace]:
    """Each caller asks again as soon as it has its answer, while `going`; once at least."""
    traces: list[Trace] = []

    async def caller() -> None:
        while True:
            traces.append(await client(next(requests), tokens))
            if not going():
                return

    await asyncio.gather(*(caller() for _ in range(callers)))
    return traces


async def poisson(client: Client, requests: Iterator[Request], rate: float, count: int, tokens: int) -> list[Trace]:
    """`count` requests that arrive at random, `rate` a second in the mean, whatever else runs."""
    gaps = np.random.default_rng(0).exponential(1 / rate, count)
    started = perf_counter()

    async def caller(due: float, request: Request) -> Trace:
        await asyncio.sleep(started + due - perf_counter())
        return await client(request, tokens)

    return await asyncio.gather(*(caller(due, next(requests)) for due in np.cumsum(gaps)))


def until(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have not passed yet."""
    deadline = perf_counter() + seconds
    return lambda: perf_counter() < deadline


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50 and p99 in ms; None of nothing."""
    if not len(seconds):
        return None
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {"p50": float(p50), "p99": float(p99)}


def measured(braid: Braid, load: Coroutine[Any, Any, list[Trace]]) -> Row:
    """The numbers of one cell."""
    before = steps_of(braid)
    traces = asyncio.run(load)
    after = steps_of(braid)
    done = [trace for trace in traces if trace.answer]
    row: Row = {"requests": len(done), "failed": len(traces) - len(done)}
    row["errors"] = sorted({trace.error for trace in traces if trace.error})
    if done:
        elapsed = max(trace.ended for trace in traces) - min(trace.started for trace in traces)
        tokens = sum(len(trace.answer.token_ids) for trace in done if trace.answer)
        row |= {
            "requests_per_s": len(done) / elapsed,
            "tokens_per_s": tokens / elapsed,
            "first_token_ms": percentiles([trace.pieces[0] - trace.started for trace in done if trace.pieces]),
            "inter_token_ms": percentiles(np.concatenate([np.diff(trace.pieces) for trace in done])),
            "pieces_per_token": sum(len(trace.pieces) for trace in done) / tokens,
            "load_ms": statistics.mean(trace.answer.timings.load_ms for trace in done if trace.answer),
        }
    if before and after and after[0] > before[0]:
        row |= {"steps": after[0] - before[0], "tokens_per_step": (after[1] - before[1]) / (after[0] - before[0])}
    return row


def steps_of(braid: Braid) -> tuple[int, int] | None:
    """Passes of the model so far and the tokens in them; None where statistics do not have it."""
    stats = braid.stats()
    steps, tokens = getattr(stats, "steps", None), getattr(stats, "step_tokens", None)
    return None if steps is None or tokens is None else (steps, tokens)


def serving(load: Workload, pool: str) -> Iterator[Row]:
    """Closed loops, and Poisson arrivals at half of their best rate."""
    shape, best = load.shape, 0.0
    for callers in shape.callers:
        requests = load.ready(seed=100 + callers)
        going = until(shape.seconds)
        row = measured(load.braid, closed(load.client, requests, callers, shape.answer_tokens, going))
        best = max(best, row.get("requests_per_s", 0.0))
        yield {"pool": pool, "load": "closed", "callers": callers, **row}
    if best:
        rate, requests = best / 2, load.ready(seed=99)
        count = max(4, round(rate * shape.seconds))
        row = measured(load.braid, poisson(load.client, requests, rate, count, shape.answer_tokens))
        yield {"pool": pool, "load": "poisson", "arrivals_per_s": rate, **row}


# single questions about the engine


def aask8(load: Workload) -> Row:
    """Passes of the model for 8 `aask` at once and for `ask_many` of the same 8."""
    tokens, pairs = load.shape.short_answer_tokens, load.contexts(8, seed=2)

    async def gathered() -> None:
        await asyncio.gather(*(context.aask(question, max_new_tokens=tokens) for context, question in pairs))

    many = passes(load.braid, lambda: load.braid.ask_many(pairs, max_new_tokens=tokens))
    several = passes(load.braid, lambda: asyncio.run(gathered()))
    if several is None or many is None:
        return {"skipped": "this version counts no steps, and its CUDA graphs hide them"}
    return {"requests": 8, "tokens": tokens, "aask_passes": several, "ask_many_passes": many}


def passes(braid: Braid, run: Callable[[], object]) -> int | None:
    """Passes of the model during a call; None where they can't be counted.

    Older versions have no `Stats.steps`: there calls of the model are counted, which a replayed CUDA graph is not.
    """
    if before := steps_of(braid):
        run()
        after = steps_of(braid)
        return after[0] - before[0] if after else None
    if braid.device.type != "cpu":
        return None
    model, calls = braid._engine.model, 0
    forward = model.forward

    def counting(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    model.forward = counting
    try:
        run()
    finally:
        del model.forward
    return calls


def threads(load: Workload) -> Row:
    """tokens/s of threads that call `ask`, and of `ask_many` of the same requests, in turns."""
    count, tokens = load.shape.threads, load.shape.thread_tokens
    pairs = load.contexts(count, seed=3)
    load.braid.ask_many(pairs, max_new_tokens=2)
    with ThreadPoolExecutor(count) as pool:

        def by_threads() -> None:
            list(pool.map(lambda pair: whole(pair[0].ask(pair[1], max_new_tokens=tokens), tokens), pairs))

        def by_many() -> None:
            load.braid.ask_many(pairs, max_new_tokens=tokens)

        rates: dict[str, list[float]] = {"ask": [], "ask_many": []}
        for _ in range(load.shape.rounds):
            for name, run in (("ask", by_threads), ("ask_many", by_many)):
                started = perf_counter()
                run()
                rates[name].append(count * tokens / (perf_counter() - started))
    row = {name: spread(values, "tokens/s") for name, values in rates.items()}
    return {"threads": count, "tokens": tokens, **row, "ratio": row["ask"]["value"] / row["ask_many"]["value"]}


def lone(load: Workload) -> Iterator[Row]:
    """Tokens per second after the first, on the clock of a caller that is alone."""
    tokens, question = load.shape.lone_tokens, load.questions[0]
    for chunks in (0, load.shape.lone_chunks):
        context = load.braid.compose([load.system, *load.corpus[:chunks]])
        rates = []
        for _ in range(1 + load.shape.lone_answers):
            started = perf_counter()
            answer = whole(context.ask(question, max_new_tokens=tokens), tokens)
            rates.append((tokens - 1) / (perf_counter() - started - answer.timings.first_token_ms / 1e3))
        length = len(context.prompt_ids(question))
        yield {"prompt_tokens": length, "tokens": tokens, **spread(rates[1:], "tokens/s")}


def register(load: Workload) -> Row:
    """Time between tokens of running answers while texts are registered in another thread, and without that."""
    shape = load.shape
    texts = load.texts(range(2_000_000, 2_000_000 + shape.registered))  # making them takes the interpreter long

    def answers(going: Callable[[], bool]) -> Coroutine[Any, Any, list[Trace]]:
        return closed(load.client, load.requests(seed=4), shape.running, shape.running_tokens, going)

    async def beside() -> tuple[list[Trace], float, float]:
        running = asyncio.create_task(answers(lambda: not done.is_set()))
        await asyncio.sleep(shape.seconds / 4)  # so that all of them run
        started = perf_counter()
        try:
            await asyncio.to_thread(load.register, texts)
        finally:
            ended = perf_counter()
            done.set()
        return await running, started, ended

    done = asyncio.Event()
    idle = percentiles(gaps(asyncio.run(answers(until(shape.seconds)))))
    traces, started, ended = asyncio.run(beside())
    busy = percentiles(gaps(traces, started, ended))
    row = {"running": shape.running, "texts": shape.registered, "text_tokens": shape.chunk_tokens}
    row |= {"register_s": ended - started, "idle_ms": idle, "registering_ms": busy}
    return row | {"ratio": {name: busy[name] / idle[name] for name in idle} if idle and busy else None}


def gaps(traces: list[Trace], since: float = 0.0, to: float = float("inf")) -> list[float]:
    """Seconds between pieces, of the gaps that lie in a time or touch it."""
    pairs = [pair for trace in traces for pair in zip(trace.pieces, trace.pieces[1:], strict=False)]
    return [later - earlier for earlier, later in pairs if later > since and earlier < to]


def join(load: Workload) -> Row:
    """Host time of a join and of a leave among the rows of many callers: the engine's thread's own time on a processor,
    without what it waits for the interpreter."""
    runner = getattr(getattr(load.braid._engine, "_loop", None), "runner", None)  # older versions have none
    if not hasattr(runner, "_join"):
        return {"skipped": "here no row joins or leaves the tables of CUDA graphs"}
    spent: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)

    def timed(name: str, rows: int, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            started = thread_time()
            try:
                return work(*given)
            finally:
                spent[name] += thread_time() - started
                counts[name] += len(given[0]) if rows else 1

        return call

    parts = {"_join": 1, "_attention": 0, "_place_rows": 0, "_leave": 1}
    for name, rows in parts.items():
        setattr(runner, name, timed(name, rows, getattr(runner, name)))
    try:
        requests, going = load.ready(seed=6), until(load.shape.seconds)
        asyncio.run(closed(load.client, requests, load.shape.threads, load.shape.answer_tokens, going))
    finally:
        for name in parts:
            delattr(runner, name)
    joins = spent["_join"] + spent["_attention"]
    return {
        "callers": load.shape.threads,
        "joins": counts["_join"],
        "join_us": joins / counts["_join"] * 1e6,
        "leave_us": spent["_leave"] / counts["_leave"] * 1e6,
        "place_us": spent["_place_rows"] / counts["_place_rows"] * 1e6,
    }


# the run


@contextmanager
def opened(folder: Path, device: str, pool_bytes: int) -> Iterator[Braid]:
    """The checkpoint; on a GPU on Triton's kernels, with all graphs captured."""
    kernels = "triton" if device == "cuda" else None
    store = folder.with_name("store")
    with Braid(folder, store=store, device=device, dtype="bfloat16", kernels=kernels, pool_bytes=pool_bytes) as braid:
        braid.warm_up(requests=64, progress=False)
        yield braid


def run(folder: Path, device: str, shape: Shape, only: Sequence[str], show: Callable[[str, object], None]) -> None:
    """Measure the parts that were asked for."""
    single = {"aask8": aask8, "threads": threads, "register": register, "join": join}
    with opened(folder, device, shape.pool_bytes) as braid:
        load = Workload(braid, shape, folder)
        stats = braid.stats()
        beside = shape.pool_bytes - stats.pool_capacity_bytes  # what CUDA graphs take of it
        third = beside + stats.pool_used_bytes // 3
        show("check", check(load))
        if "resident" in only:
            for row in serving(load, "resident"):
                show("rows", row)
        if "lone" in only:
            for row in lone(load):
                show("lone", row)
        for name, part in single.items():
            if name in only:
                show(name, part(load))
    if "third" in only:
        with opened(folder, device, third) as braid:
            load = Workload(braid, shape, folder)
            show("check_third", check(load))
            for request in load.some(2 * shape.checked, seed=5):  # the pool holds what is asked for often
                braid.ask(request.question, chunks=request.chunks, max_new_tokens=1)
            for row in serving(load, "third"):
                show("rows", row)


def eight_over_one(rows: Sequence[Row]) -> float | None:
    """requests/s of 8 callers over those of one, everything resident; None where one of them is missing."""
    loops = {row["callers"]: row for row in rows if row["load"] == "closed" and row["pool"] == "resident"}
    rates = [loops.get(callers, {}).get("requests_per_s") for callers in (8, 1)]
    return rates[0] / rates[1] if all(rates) else None


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton

        found["triton"] = triton.__version__
    return {**found, "transformers": transformers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, a comma between them; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--callers", type=int, nargs="+", help="of the closed loops; default: 1 8 64 256, on a CPU 1 8")
    parser.add_argument("--seconds", type=float, help="in which the requests of a cell start; default: 5, on a CPU 20")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoint and store, 22 GB; default: the system's")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(PARTS):
        parser.error(f"--only must name parts of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    shape = ON_GPU if options.device == "cuda" else ON_CPU
    shape = quick(shape) if options.quick else shape
    shape = replace(shape, callers=tuple(options.callers or shape.callers), seconds=options.seconds or shape.seconds)
    report: Row = {
        "command": " ".join(["python benchmarks/serving.py", *without_folders(sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "model": f"Qwen3-{shape.geometry} geometry, random weights, bfloat16",
        "shape": asdict(shape),
        "rows": [],
        "lone": [],
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

    with tempfile.TemporaryDirectory(dir=options.scratch) as parent:
        folder = Path(parent, "checkpoint")
        save_checkpoint(folder, shape.geometry, options.device, telling=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
        run(folder, options.device, shape, only, show)
    if ratio := eight_over_one(report["rows"]):
        show("eight_over_one", ratio)


def without_folders(arguments: Sequence[str]) -> list[str]:
    """A command's arguments without those that name places of this machine."""
    kept, names = [], iter(arguments)
    for name in names:
        if name in ("--out", "--scratch"):
            next(names, None)
        elif not name.startswith(("--out=", "--scratch=")):
            kept.append(name)
    return kept


if __name__ == "__main__":
    main()
