"""Cascade attention on one GPU: microseconds per layer, in a CUDA graph over many layers' memory, so that L2 is cold.

    python benchmarks/kernels/attention.py --out attention.json
    python benchmarks/kernels/attention.py --flashinfer --out attention.json

Results are checked against the float64 reference before their times are reported. Where several requests share pages,
our kernel is timed once more as if they did not, so that each request reads its own.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import triton
from compiled import compiled_kernels
from torch import Tensor

from braidsdk.kernels.attention import launch as attention
from braidsdk.kernels.attention.plan import RequestPlan, plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable

PAGE, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 64, 28, 16, 8, 128
DEVICE = torch.device("cuda")
SCALE = HEAD_DIM**-0.5


class Memory:
    """Entries in paged memory of all layers."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.pages = 0

    def entry(self, tokens: int) -> tuple[Tensor, int]:
        first, self.pages = self.pages, self.pages + -(-tokens // PAGE)
        self.lengths.append(tokens)
        return torch.arange(first, self.pages), tokens


def placed(entries: list[tuple[Tensor, int]]) -> tuple[list[PagedSegment], int]:
    """Segments one after another, and where the last ends."""
    origin, segments = 0, []
    for pages, tokens in entries:
        segments.append(PagedSegment(pages, 0, tokens, origin))
        origin += tokens
    return segments, origin


def chunks(memory: Memory, total: int, ragged: bool, random_state: random.Random) -> list[tuple[Tensor, int]]:
    """Entries of 512 tokens, or of 37 to 1,100, `total` tokens in all."""
    made, left = [], total
    while left:
        tokens = min(left, random_state.randint(37, 1100) if ragged else 512)
        made.append(memory.entry(tokens))
        left -= tokens
    return made


def requests_of(
    memory: Memory, contexts: list[list[tuple[Tensor, int]]], own: int, rows: int
) -> tuple[list[Request], list[int]]:
    """One request per context, with `own` tokens of its own, the last `rows` of them asking."""
    requests, positions = [], []
    for context in contexts:
        segments, origin = placed(context)
        pages, _ = memory.entry(own)
        start = len(positions)
        positions += range(origin + own - rows, origin + own)
        tail = PagedSegment(pages, 0, own, origin)
        requests.append(Request(slice(start, len(positions)), (*segments, tail)))
    return requests, positions


def cases() -> dict[str, Callable[[Memory, random.Random], tuple[list[Request], list[int]]]]:
    """Name to what makes it."""

    def shared(total: int, users: int, own: int, rows: int, ragged: bool, shuffled: bool = False) -> Callable:
        def make(memory: Memory, state: random.Random) -> tuple[list[Request], list[int]]:
            context = chunks(memory, total, ragged, state)
            orders = [state.sample(context, len(context)) if shuffled else context for _ in range(users)]
            return requests_of(memory, orders, own, rows)

        return make

    def subsets(ragged: bool) -> Callable:
        def make(memory: Memory, state: random.Random) -> tuple[list[Request], list[int]]:
            pool = [memory.entry(state.randint(37, 1100) if ragged else 512) for _ in range(32)]
            return requests_of(memory, [state.sample(pool, 8) for _ in range(64)], 64, 1)

        return make

    named: dict[str, Callable] = {}
    for ragged in (False, True):
        end = ", ragged" if ragged else ""
        named |= {
            f"1 request, 8k{end}": shared(8192, 1, 64, 1, ragged),
            f"1 request, 32k{end}": shared(32768, 1, 64, 1, ragged),
            f"64 requests, one 8k{end}": shared(8192, 64, 64, 1, ragged),
            f"64 requests, one 8k, each in its own order{end}": shared(8192, 64, 64, 1, ragged, True),
            f"64 requests, one 32k{end}": shared(32768, 64, 64, 1, ragged),
            f"64 requests, 8 random of 32 chunks{end}": subsets(ragged),
            f"question of 32 tokens, 8k{end}": shared(8192, 1, 32, 32, ragged),
            f"question of 32 tokens, 32k{end}": shared(32768, 1, 32, 32, ragged),
        }
    named["1 request, 64"] = shared(0, 1, 64, 1, False)
    named["register 4 x 512 after 256"] = lambda memory, _: _register(memory, 4)
    named["register 32 x 512 after 256"] = lambda memory, _: _register(memory, 32)
    return named


def _register(memory: Memory, count: int) -> tuple[list[Request], list[int]]:
    anchor = memory.entry(256)
    requests, positions = [], []
    for _ in range(count):
        pages, tokens = memory.entry(512)
        start = len(positions)
        positions += range(256, 256 + tokens)
        segments = (PagedSegment(anchor[0], 0, 256, 0), PagedSegment(pages, 0, tokens, 256))
        requests.append(Request(slice(start, len(positions)), segments))
    return requests, positions


def bytes_read(requests: list[Request], positions: list[int]) -> int:
    """Keys and values of every page that some row sees, once; queries and results."""
    seen: dict[int, int] = {}
    for request in requests:
        for segment in request.segments:
            for index in range(segment.start // PAGE, -(-segment.stop // PAGE)):
                page = int(segment.pages[index])
                seen[page] = max(seen.get(page, 0), min(PAGE, segment.stop - index * PAGE))
    return sum(seen.values()) * 2 * KV_HEADS * HEAD_DIM * 2 + len(positions) * Q_HEADS * HEAD_DIM * 4


def unshared(requests: list[Request]) -> tuple[list[Request], Tensor]:
    """The same requests as if no page were shared: with page ids of their own, and the page that each stands for."""
    made, pages = [], [torch.zeros(0, dtype=torch.int64)]
    for request in requests:
        segments = []
        for segment in request.segments:
            first = sum(map(len, pages))
            segments.append(replace(segment, pages=torch.arange(first, first + len(segment.pages))))
            pages.append(segment.pages)
        made.append(replace(request, segments=tuple(segments)))
    return made, torch.cat(pages)


def timed(run: Callable[[int], Tensor], layers: int, repeats: int) -> tuple[list[float], Tensor]:
    """Microseconds a layer, of replays of a graph over all layers; and what it gave for the first."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()  # memory and plans were made on another stream
    with torch.cuda.stream(stream):
        run(0)
        with torch.cuda.graph(graph, stream=stream):
            out = run(0)
            for layer in range(1, layers):
                run(layer)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / layers)
    return times, out.clone()


def measure(name: str, peer: ModuleType | None, repeats: int = 30) -> dict[str, object]:
    """Time one case, our kernel and what else can compute it, and check what each gave.

    Args:
        name: the case's.
        peer: `flashinfer_peer`, or None.
        repeats: replays that the medians are of.
    """
    memory = Memory()
    requests, positions = cases()[name](memory, random.Random(0))
    layers = LAYERS if memory.pages * PAGE < 20_000 else 8
    kv = torch.randn(layers, 2, memory.pages, KV_HEADS, PAGE, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    queries = torch.randn(layers, len(positions), Q_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    inv_freq = 1.0 / (1e6 ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM))
    at = torch.tensor(positions)
    limit = max(positions) + 1
    few = [requests[0], requests[-1]]
    rows = torch.cat([torch.arange(each.rows.start, each.rows.stop) for each in few]).to(DEVICE)
    wide = RotaryTable(inv_freq, 1.0, torch.float64, DEVICE)
    turned = [made for each in few if (made := plan_request(at.to(DEVICE), each, wide, limit, PAGE))]
    unturned = [replace(each, cos=torch.ones_like(each.cos), sin=torch.zeros_like(each.sin)) for each in turned]
    rotary = RotaryTable(inv_freq, 1.0, torch.float32, DEVICE)

    def planned(asked: list[Request]) -> attention.TritonPlan:
        return attention.plan_for_triton(
            at, asked, rotary, limit=limit, page_size=PAGE, group=Q_HEADS // KV_HEADS, kv_heads=KV_HEADS
        )

    def judged(
        who: str, run: Callable[[Tensor, Tensor], Tensor], truth: list[RequestPlan]
    ) -> tuple[list[float], float]:
        times, out = timed(lambda layer: run(queries[layer], kv[layer]), layers, repeats)
        expected = cascade_attention_reference(queries[0].double(), truth, kv[0].double(), SCALE)[rows]
        error = float((out[rows].double() - expected).norm() / expected.norm())
        if not error < 1e-2:
            raise SystemExit(f"{name}, {who}: relative error {error:.2e} against the reference")
        return times, error

    def ours(plan: attention.TritonPlan) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda query, layer: plan.attend(query, layer, SCALE)

    plan = planned(requests)
    times, error = judged("ours", ours(plan), turned)
    row = {
        "case": name,
        "us": round(statistics.median(times), 2),
        "us_least": round(min(times), 2),
        "floor_us": round(bytes_read(requests, positions) / 4.24e6, 2),
        "error": error,
        "items": len(plan.tables.items),
        "partials": plan.launch.partials,
    }
    if 1 < len(requests) == len(positions):
        apart, pages = unshared(requests)
        plan = planned(apart)
        tables = replace(plan.tables, pages=pages.int().to(DEVICE)[plan.tables.pages.long()])
        times, _ = judged("one read per request", ours(replace(plan, tables=tables)), turned)
        row["unshared_us"] = round(statistics.median(times), 2)
    if peer:
        row["flashinfer_us"] = {
            way: round(statistics.median(judged(f"FlashInfer, {way}", make(), unturned)[0]), 2)
            for way, make in peer.ways(requests, Q_HEADS, kv[0]).items()
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--flashinfer", action="store_true", help="FlashInfer beside it; it compiles for some minutes")
    options = parser.parse_args()
    peer = None
    if options.flashinfer:
        try:
            peer = import_module("flashinfer_peer")
        except ImportError as error:
            parser.error(f"--flashinfer: {error}. Install flashinfer-python==0.6.3, which also needs nvcc and ninja.")
    torch.manual_seed(0)
    record: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **({"flashinfer": peer.VERSION} if peer else {}),
        "geometry": {"q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "page": PAGE},
    }
    rows = []
    for name in cases():
        if options.only in name:
            row = measure(name, peer)
            rows.append(row)
            print(
                f"{name:60} {row['us']:8} us  floor {row['floor_us']:7}  error {row['error']:.1e} items {row['items']}"
                f" unshared {row.get('unshared_us', '-')} flashinfer {row.get('flashinfer_us', '-')}",
                flush=True,
            )
            if options.out:
                report = {**record, "rows": rows, "compiled": compiled_kernels()}
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
