"""The linear operations on one GPU: microseconds a call, in a CUDA graph over many layers' weights, so that L2 is cold.

    python benchmarks/kernels/linear.py --out linear.json
    python benchmarks/kernels/linear.py --sweep --ops norm_qkv out_proj --rows 1 32 --geometries 0.6B --out sweep.json

Each operation is first checked against float64, by the ratio of our RMS error to that of torch's own, and then
timed beside it. With `--weights int8` ours reads 8-bit integers, and torch the bf16 numbers that they stand for.
`layer` is a decoder layer without its attention: four operations in a row. `--sweep` tries other shapes of the kernels
and names the best, and `--keep` writes it to the operation's `tiles.json`, where the kernels take their shapes from, if
it is at least 2 % faster than what is there.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch
import triton
from compiled import compiled_kernels
from torch import Tensor

from braidsdk.kernels import launch
from braidsdk.kernels.head import greedy, norm_head
from braidsdk.kernels.head import launch as head_launch
from braidsdk.kernels.launch import MATRIX_ROWS, Tile, tile_for
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.norm_qkv import launch as norm_qkv_launch
from braidsdk.kernels.out_proj import launch as out_proj_launch
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.rms_norm import rms_norm
from braidsdk.kernels.swiglu import launch as swiglu_launch
from braidsdk.kernels.swiglu import norm_swiglu
from braidsdk.kernels.weight import GROUP, Int8, quantised

DEVICE, EPS, PAGE, VOCAB = torch.device("cuda"), 1e-6, 64, 151_936
BANDWIDTH, MATRIX_RATE = 4.24e12, 790e12
"""Bytes and bf16 operations a second, as measured on an H200."""
COLD_BYTES, FEWEST, MOST = 600_000_000, 3, 36
"""What one graph reads at least, many times the L2 cache, and how many sets of weights that may take."""
WORST_RATIO = 1.10
"""Of our RMS error to torch's, beside what chance adds over few numbers."""

Values = tuple[Tensor, ...]
Run = Callable[[str], Values]
"""Runs an operation by a backend ("triton" or "torch"), on one set of weights."""


@dataclass(frozen=True)
class Geometry:
    """A model's sizes."""

    hidden: int
    q_heads: int
    kv_heads: int
    inner: int
    head_dim: int = 128


GEOMETRIES = {
    "0.6B": Geometry(1024, 16, 8, 3072),
    "1.7B": Geometry(2048, 16, 8, 6144),
    "4B": Geometry(2560, 32, 8, 9728),
    "8B": Geometry(4096, 32, 8, 12288),
}
"""Of Qwen3."""


@dataclass(frozen=True)
class Work:
    """An operation at some geometry and number of rows.

    Attributes:
        make: draws bf16 weights and inputs, converts them to a dtype, and gives what runs over them.
        bytes: that one call must read and write.
        products: multiply-adds of one call.
        modules: whose tables give the kernels' shapes.
    """

    make: Callable[[torch.dtype], Run]
    bytes: float
    products: int = 0
    modules: tuple[ModuleType, ...] = ()


def draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16().to(dtype)


def works(g: Geometry, rows: int, weights: str) -> dict[str, Work]:
    """All operations by name, over weights in bf16 ("auto") or "int8"."""

    def draw_weight(dtype: torch.dtype, out: int, size: int) -> dict[str, Tensor | Int8]:
        """A weight as each backend reads it."""
        weight = draw(dtype, out, size, scale=size**-0.5)
        if weights == "auto":
            return dict.fromkeys(("triton", "torch"), weight)
        int8 = quantised(weight)
        return {"triton": int8, "torch": int8.dense(dtype)}

    width = g.q_heads * g.head_dim
    packed = width + 2 * g.kv_heads * g.head_dim

    def make_qkv(dtype: torch.dtype) -> Run:
        hidden = draw(dtype, rows, g.hidden)
        norm, q_norm, k_norm = draw(dtype, g.hidden), draw(dtype, g.head_dim), draw(dtype, g.head_dim)
        weights = {
            backend: NormQKVWeights(norm=norm, qkv=qkv, bias=None, q_norm=q_norm, k_norm=k_norm)
            for backend, qkv in draw_weight(dtype, packed, g.hidden).items()
        }
        angle = torch.rand(rows, g.head_dim // 2, device=DEVICE, dtype=torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        kv = torch.zeros(2, rows // PAGE + 1, g.kv_heads, PAGE, g.head_dim, device=DEVICE, dtype=dtype)
        slots = torch.arange(rows, device=DEVICE)
        return lambda backend: (norm_qkv(hidden, weights[backend], EPS, cos, sin, kv, slots, backend=backend), kv)

    def make_projection(dtype: torch.dtype, size: int) -> Run:
        x, residual = draw(dtype, rows, size), draw(dtype, rows, g.hidden)
        weight = draw_weight(dtype, g.hidden, size)
        return lambda backend: (out_proj(x, weight[backend], None, residual, backend=backend),)

    def make_swiglu(dtype: torch.dtype) -> Run:
        hidden, norm = draw(dtype, rows, g.hidden), draw(dtype, g.hidden)
        gate_up = draw_weight(dtype, 2 * g.inner, g.hidden)
        return lambda backend: (norm_swiglu(hidden, norm, gate_up[backend], EPS, backend=backend),)

    def make_layer(dtype: torch.dtype) -> Run:
        qkv = make_qkv(dtype)
        hidden, norm = draw(dtype, rows, g.hidden), draw(dtype, g.hidden)
        out, down = (draw_weight(dtype, g.hidden, size) for size in (width, g.inner))
        gate_up = draw_weight(dtype, 2 * g.inner, g.hidden)

        def run(backend: str) -> Values:
            attended = out_proj(qkv(backend)[0].view(rows, width), out[backend], None, hidden, backend=backend)
            inner = norm_swiglu(attended, norm, gate_up[backend], EPS, backend=backend)
            return (out_proj(inner, down[backend], None, attended, backend=backend),)

        return run

    def make_head(dtype: torch.dtype) -> Run:
        hidden, norm = draw(dtype, rows, g.hidden), draw(dtype, g.hidden)
        head = draw_weight(dtype, VOCAB, g.hidden)
        return lambda backend: (norm_head(hidden, norm, head[backend], EPS, backend=backend),)

    def make_greedy(dtype: torch.dtype) -> Run:
        logits = draw(torch.promote_types(dtype, torch.float32), rows, VOCAB)
        return lambda backend: (greedy(logits.float(), backend=backend)[0],)

    def make_norm(dtype: torch.dtype) -> Run:
        x, weight = draw(dtype, rows, g.hidden), draw(dtype, g.hidden)
        return lambda backend: (rms_norm(x, weight, EPS, backend=backend),)

    qkv, gate_up = packed * g.hidden, 2 * g.inner * g.hidden
    out, down, head = width * g.hidden, g.inner * g.hidden, VOCAB * g.hidden
    each = 2 if weights == "auto" else 1 + 4 / GROUP  # bytes of a number of a weight
    moved = {
        "norm_qkv": each * qkv + 2 * rows * (g.hidden + packed),
        "out_proj": each * out + 2 * rows * (width + 2 * g.hidden),
        "norm_swiglu": each * gate_up + 2 * rows * (g.hidden + g.inner),
        "down": each * down + 2 * rows * (g.inner + 2 * g.hidden),
    }
    return {
        "norm_qkv": Work(make_qkv, moved["norm_qkv"], rows * qkv, (norm_qkv_launch,)),
        "out_proj": Work(lambda d: make_projection(d, width), moved["out_proj"], rows * out, (out_proj_launch,)),
        "norm_swiglu": Work(make_swiglu, moved["norm_swiglu"], rows * gate_up, (swiglu_launch,)),
        "down": Work(lambda d: make_projection(d, g.inner), moved["down"], rows * down, (out_proj_launch,)),
        "layer": Work(
            make_layer,
            sum(moved.values()),
            rows * (qkv + out + gate_up + down),
            (norm_qkv_launch, out_proj_launch, swiglu_launch),
        ),
        "norm_head": Work(make_head, each * head + 2 * rows * (g.hidden + 2 * VOCAB), rows * head, (head_launch,)),
        "greedy": Work(make_greedy, 4 * rows * VOCAB),
        "rms_norm": Work(make_norm, 4 * rows * g.hidden),
    }


@contextmanager
def tiles(modules: Iterable[ModuleType], rows: int, tile: Tile | None) -> Iterator[None]:
    """Within, this shape serves so many rows in these modules; None leaves what is there."""
    tables = [by_columns for module in modules for by_columns in module.TILES.values()]
    kept = [(by_rows, dict(by_rows)) for by_columns in tables for by_rows in by_columns.values()]
    for by_rows, before in kept if tile else ():
        by_rows[min((size for size in before if size >= rows), default=max(before))] = tile
    yield
    for by_rows, before in kept:
        by_rows.update(before)


def judge(work: Work) -> Callable[[], float]:
    """What runs our backend and gives its RMS error over torch's, both against float64; the worst of all results.

    A ratio over n numbers scatters by about 1 / sqrt(n): four times that is taken off, down to 1.
    """

    def made(dtype: torch.dtype) -> Run:
        torch.manual_seed(0)
        return work.make(dtype)

    truths = [value.double() for value in made(torch.float64)("torch")]
    theirs = [value.double() for value in made(torch.bfloat16)("torch")]
    run = made(torch.bfloat16)

    def ratio() -> float:
        ratios = []
        for our, their, truth in zip(run("triton"), theirs, truths, strict=True):
            bad, usual = ((each.double() - truth).norm() for each in (our, their))
            chance = 4 * float(truth.count_nonzero()) ** -0.5
            ratios.append(max(1.0, float(bad / usual) - chance) if usual else 1.0 + float(bad))  # ids: equal or wrong
        return max(ratios)

    return ratio


def captured(runs: list[Run], backend: str) -> torch.cuda.CUDAGraph:
    """A graph of all these runs in a row."""
    for run in runs[:2]:  # compiled, and counters made, before the capture
        run(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run(backend)
    return graph


def timed(runs: list[Run], backend: str, repeats: int) -> tuple[float, float]:
    """Microseconds a run: median over replays, and their interquartile range."""
    graph = captured(runs, backend)
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(runs))
    low, middle, high = statistics.quantiles(times[3:], n=4)
    return middle, high - low


def copies(work: Work) -> list[Run]:
    """Sets of weights, enough that none is in the L2 cache when its turn comes."""
    torch.manual_seed(1)
    count = int(min(max(COLD_BYTES // work.bytes, FEWEST), MOST))
    return [work.make(torch.bfloat16) for _ in range(count)]


def rates(work: Work, us: float) -> dict[str, float]:
    """What a time means: GB/s with its share of the ceiling, TFLOP/s with its share."""
    bandwidth, rate = work.bytes / us * 1e6, 2 * work.products / us * 1e6
    return {
        "us": round(us, 2),
        "GB/s": round(bandwidth / 1e9),
        "of_bandwidth": round(bandwidth / BANDWIDTH, 3),
        "TFLOP/s": round(rate / 1e12, 1),
        "of_matrix_rate": round(rate / MATRIX_RATE, 3),
    }


def measure(name: str, geometry: str, rows: int, weights: str, repeats: int) -> dict[str, object]:
    """Check one operation, then time both paths."""
    work = works(GEOMETRIES[geometry], rows, weights)[name]
    error = judge(work)()
    if not error <= WORST_RATIO:
        raise SystemExit(f"{name}, {geometry}, {rows} rows: RMS error {error:.3f} times torch's; not timed.")
    runs = copies(work)
    row: dict[str, object] = {"op": name, "geometry": geometry, "rows": rows, "weights": weights}
    row["error_ratio"] = round(error, 4)
    row["floor_us"] = round(max(work.bytes / BANDWIDTH, 2 * work.products / MATRIX_RATE) * 1e6, 2)
    for backend in ("triton", "torch"):
        us, spread = timed(runs, backend, repeats)
        row[backend] = {**rates(work, us), "spread_us": round(spread, 2)}
    return row


def candidates(name: str, rows: int, weights: str) -> list[Tile]:
    """Shapes worth trying: what fits in registers or shared memory, and keeps enough in flight."""
    found = []
    sets, size = 2 if name == "norm_swiglu" else 1, 2 if weights == "auto" else 1
    if rows < MATRIX_ROWS:
        for block_n, block_k, warps, stages in product((4, 8, 16, 32), (256, 512, 1024), (2, 4, 8), (1, 2, 4, 8)):
            registers = sets * block_n * block_k * (stages * size + 4 * rows) // (warps * 32 * 4)
            if block_n >= warps and block_k * size >= 16 * 32 and 8 <= registers <= 160:
                found.append(Tile(block_n, block_k, warps, stages))
    else:
        height = next((size for size in (16, 32) if size >= rows), 64)
        for block_n, block_k, warps, stages in product((64, 128), (64, 128, 256, 512), (4, 8), (1, 2, 3, 4, 6)):
            shared = (size * block_n + 2 * height) * block_k * stages
            if weights == "int8" and block_k > GROUP:
                continue
            if 24_000 <= shared <= 200_000 and block_n * height // (warps * 32) <= 64:
                found.append(Tile(block_n, block_k, warps, stages))
    return found


def compile_one(name: str, geometry: str, rows: int, weights: str, tile: Tile) -> str | None:
    """Compile a kernel into Triton's cache on disk, in a process of its own; what went wrong, or None."""
    work = works(GEOMETRIES[geometry], rows, weights)[name]
    try:
        with tiles(work.modules, rows, tile):
            work.make(torch.bfloat16)("triton")
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, say: not a candidate
        return f"{type(error).__name__}: {error}"[:120]
    return None


def sweep(
    name: str, geometry: str, rows: int, weights: str, repeats: int, pool: ProcessPoolExecutor
) -> dict[str, object]:
    """Time an operation in every shape worth trying; the best five, and what is in use."""
    work = works(GEOMETRIES[geometry], rows, weights)[name]
    if len(work.modules) != 1:
        raise SystemExit(f"{name} has no shape of its own to sweep.")
    tried = candidates(name, rows, weights)
    jobs = [pool.submit(compile_one, name, geometry, rows, weights, tile) for tile in tried]
    failed = [job.result() for job in jobs]
    runs, ratio, results = copies(work), judge(work), []
    for tile, failure in zip([None, *tried], [None, *failed], strict=True):
        if failure:
            continue
        with tiles(work.modules, rows, tile):
            if (error := ratio()) <= WORST_RATIO:
                results.append({"us": round(timed(runs, "triton", repeats)[0], 2), "tile": tile and asdict(tile)})
            else:
                print(f"{name} {geometry} {rows}: {tile} errs {error:.3f} times as much as torch", file=sys.stderr)
    in_use, others = results[0], sorted(results[1:], key=lambda result: result["us"])
    return {
        "op": name,
        "geometry": geometry,
        "rows": rows,
        "weights": weights,
        "floor_us": round(work.bytes / BANDWIDTH * 1e6, 2),
        "torch_us": round(timed(runs, "torch", repeats)[0], 2),
        "in_use_us": in_use["us"],
        "tried": len(others),
        "failed": sum(map(bool, failed)),
        "best": others[:5],
    }


def keep(name: str, geometry: str, rows: int, weights: str, found: dict[str, object]) -> None:
    """Write the best shape of a sweep to the table of its operation, under the weight's own columns."""
    (module,) = works(GEOMETRIES[geometry], rows, weights)[name].modules
    g = GEOMETRIES[geometry]
    columns = {"out_proj": g.q_heads * g.head_dim, "down": g.inner}.get(name, g.hidden)
    best = found["best"][0] if found["best"] else None
    if best and best["us"] < 0.98 * found["in_use_us"]:
        weight = torch.empty(1, columns)
        tiles = module.TILES["float" if weights == "auto" else weights]
        block_rows, _ = tile_for({"float": tiles}, rows, weight)
        by_rows = next((tiles[size] for size in sorted(tiles) if size >= columns), {})
        tiles[columns] = {**by_rows, **tiles.get(columns, {}), block_rows: Tile(**best["tile"])}
        launch.write_tiles(Path(module.__file__).with_name("tiles.json"), module.TILES)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(works(GEOMETRIES["0.6B"], 1, "auto"))
    parser.add_argument("--ops", nargs="+", default=names, choices=names)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 64, 512, 4096])
    parser.add_argument("--geometries", nargs="+", default=list(GEOMETRIES), choices=list(GEOMETRIES))
    parser.add_argument("--weights", default="auto", choices=["auto", "int8"], help="what our operations read")
    parser.add_argument("--repeats", type=int, default=30, help="replays that the median is of")
    parser.add_argument("--sweep", action="store_true", help="try other shapes of the kernels")
    parser.add_argument("--keep", action="store_true", help="write the best of a sweep to tiles.json")
    parser.add_argument("--processes", type=int, default=12, help="that compile for a sweep")
    parser.add_argument("--no-pdl", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.no_pdl:
        launch.dependent_launch = lambda device: False  # noqa: ARG005 (the name is the function's)
    rows = []
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for geometry, count, name in product(options.geometries, options.rows, options.ops):
            if name in ("norm_head", "greedy") and count > 64:
                continue
            if options.sweep:
                rows.append(sweep(name, geometry, count, options.weights, options.repeats, pool))
                if options.keep:
                    keep(name, geometry, count, options.weights, rows[-1])
            else:
                rows.append(measure(name, geometry, count, options.weights, options.repeats))
            print(json.dumps(rows[-1]), flush=True)
            torch.cuda.empty_cache()
            if options.out:
                kernels = {} if options.sweep else {"compiled": compiled_kernels()}
                options.out.write_text(json.dumps({**environment(options), "rows": rows, **kernels}, indent=1) + "\n")


def environment(options: argparse.Namespace) -> dict[str, object]:
    return {
        "benchmark": "linear",
        "command": " ".join(["python", "benchmarks/kernels/linear.py", *(Path(word).name for word in sys.argv[1:])]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "dependent_launch": not options.no_pdl,
        "dtype": "bfloat16",
        "geometries": {name: asdict(GEOMETRIES[name]) for name in options.geometries},
    }


if __name__ == "__main__":
    main()
