"""Each Triton kernel against its float64 reference, at a model's own shapes, and how fast it is.

    python -m braidsdk.kernels.selftest '{"hidden": 1024, "intermediate": 3072, "q_heads": 16, "kv_heads": 8,
        "head_dim": 128, "vocab": 151936, "dtype": "bfloat16"}'

Run it in a process of its own: an error on the device can't be recovered from within the process that met it. Prints a
line of JSON per case.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from torch import Tensor

from braidsdk.kernels.attention.launch import cascade_attention_triton, plan_for_triton
from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.head import greedy, norm_head
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable
from braidsdk.kernels.sample import Choices, sample
from braidsdk.kernels.swiglu import norm_swiglu

PAGE = 64
EPS = 1e-6
ROWS = (1, 2, 5, 32, 64, 300)
"""A decoded token, batches of them, questions, a prefill: every shape that a kernel has."""

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
"""Relative error (root of the summed squares) that rounding alone stays below."""

COLD_BYTES = 256e6
"""Weights and memory in turn that no L2 cache holds."""


@dataclass(frozen=True)
class Geometry:
    """A model's shapes."""

    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str


@dataclass(frozen=True)
class Result:
    """One kernel at one shape.

    Attributes:
        op: the operation, by its name in `kernels.paths.Paths`.
        case: what was computed.
        error: relative error against float64; None if it did not run.
        limit: what rounding alone stays below.
        us: microseconds a call, weights and memory cold; None if it was not timed.
        bandwidth: share of the rate of a large copy on this device; None if it was not timed.
        trouble: what went wrong, in words; empty if nothing did.
    """

    op: str
    case: str
    error: float | None
    limit: float
    us: float | None = None
    bandwidth: float | None = None
    trouble: str = ""

    @property
    def ok(self) -> bool:
        return not self.trouble and self.error is not None and self.error <= self.limit


@dataclass(frozen=True)
class _Case:
    """A call to be checked and timed: `run(copy)` uses copy `copy` of its cold memory, `truth` is of copy 0."""

    op: str
    name: str
    run: Callable[[int], Tensor]
    truth: Callable[[], Tensor]
    moved: int
    copies: int


def check(geometry: Geometry, device: torch.device, *, timed: bool = True) -> Iterator[Result]:
    """Every kernel at every case, one after another."""
    dtype = getattr(torch, geometry.dtype)
    limit = LIMITS[dtype]
    ceiling = _copy_rate(device) if timed else 0.0
    for make in _MAKERS:
        for rows in ROWS:
            case = None
            try:
                case = make(geometry, dtype, device, rows)
                error = _distance(case.run(0), case.truth())
                trouble = "" if error <= limit else f"relative error {error:.1e}, expected at most {limit:.0e}"
                result = Result(case.op, case.name, error, limit, trouble=trouble)
                if timed and not trouble:
                    us = _time(case)
                    result = replace(result, us=us, bandwidth=case.moved / us * 1e6 / ceiling)
            except Exception as problem:  # whatever it is, the answer is that this kernel does not run here
                last = traceback.format_exception_only(problem)[-1].strip()
                result = Result(make.__name__.removeprefix("_"), _counted(rows, "row"), None, limit, trouble=last[:300])
            yield result


def _distance(got: Tensor, truth: Tensor) -> float:
    error = float((got.double() - truth).norm() / truth.norm())
    return error if error == error else float("inf")


def _copies(moved: int) -> int:
    return max(2, min(64, int(COLD_BYTES / max(moved, 1)) + 1))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=device).normal_(std=scale)


def _norm_qkv(shape: Geometry, dtype: torch.dtype, device: torch.device, rows: int) -> _Case:
    outs = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
    moved = outs * shape.hidden * dtype.itemsize
    copies = _copies(moved)
    weights = [
        NormQKVWeights(
            norm=_random(shape.hidden, dtype=dtype, device=device),
            qkv=_random(outs, shape.hidden, dtype=dtype, device=device, scale=shape.hidden**-0.5),
            bias=None,
            q_norm=_random(shape.head_dim, dtype=dtype, device=device),
            k_norm=_random(shape.head_dim, dtype=dtype, device=device),
        )
        for _ in range(copies)
    ]
    hidden = _random(rows, shape.hidden, dtype=dtype, device=device)
    angles = torch.rand(rows, shape.head_dim // 2, device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    kv = torch.zeros(2, -(-rows // PAGE), shape.kv_heads, PAGE, shape.head_dim, dtype=dtype, device=device)
    slots = torch.arange(rows, device=device)

    def run(copy: int) -> Tensor:
        queries = norm_qkv(hidden, weights[copy], EPS, cos, sin, kv, slots, path="triton")
        return queries if copy else torch.cat((queries.flatten(), kv.flatten()))

    def truth() -> Tensor:
        own = weights[0]
        wide = NormQKVWeights(own.norm.double(), own.qkv.double(), None, own.q_norm.double(), own.k_norm.double())
        memory, turn = torch.zeros_like(kv, dtype=torch.float64), angles.double()
        queries = norm_qkv(hidden.double(), wide, EPS, turn.cos(), turn.sin(), memory, slots)
        return torch.cat((queries.flatten(), memory.flatten()))

    return _Case("norm_qkv", _counted(rows, "row"), run, truth, moved, copies)


def _attention(shape: Geometry, dtype: torch.dtype, device: torch.device, rows: int) -> _Case:
    lengths = (500, 1, 64, 2048, 37, 1100) if rows < 300 else (256, 300)
    requests: list[Request] = []
    positions: list[int] = []
    page = 0
    shared, origin = [], 0
    for tokens in lengths:
        pages = torch.arange(page, page + -(-tokens // PAGE))
        shared.append(PagedSegment(pages, 0, tokens, origin))
        origin, page = origin + tokens, page + len(pages)
    users = rows if rows == 5 else 1
    for user in range(users):
        own = torch.arange(page, page + 1)
        page += 1
        end = origin if rows >= 300 else origin + 9 + user
        positions += range(end - rows // users, end)
        tail = [] if rows >= 300 else [PagedSegment(own, 0, 9 + user, origin)]
        at = slice(len(positions) - rows // users, len(positions))
        requests.append(Request(at, (*shared, *tail)))
    moved = 2 * page * PAGE * shape.kv_heads * shape.head_dim * dtype.itemsize
    copies = _copies(moved)
    kv = _random(copies, 2, page, shape.kv_heads, PAGE, shape.head_dim, dtype=dtype, device=device)
    queries = _random(rows, shape.q_heads, shape.head_dim, dtype=dtype, device=device)
    inv_freq = 1.0 / (1e6 ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim))
    scale, limit, at_rows = shape.head_dim**-0.5, max(positions) + 1, torch.tensor(positions)
    plan = plan_for_triton(
        at_rows,
        requests,
        RotaryTable(inv_freq, 1.0, torch.float32, device),
        limit=limit,
        page_size=PAGE,
        group=shape.q_heads // shape.kv_heads,
        kv_heads=shape.kv_heads,
    )

    def truth() -> Tensor:
        wide = RotaryTable(inv_freq, 1.0, torch.float64, device)
        plans = [made for each in requests if (made := plan_request(at_rows.to(device), each, wide, limit, PAGE))]
        return cascade_attention_reference(queries.double(), plans, kv[0].double(), scale)

    name = f"{_counted(rows, 'row')} of {_counted(users, 'request')} over {sum(lengths):,} keys"
    return _Case(
        "attention",
        name,
        lambda copy: cascade_attention_triton(queries, plan, kv[copy], scale),
        truth,
        moved,
        copies,
    )


def _out_proj(shape: Geometry, dtype: torch.dtype, device: torch.device, rows: int) -> _Case:
    size = shape.intermediate
    moved = shape.hidden * size * dtype.itemsize
    copies = _copies(moved)
    weights = _random(copies, shape.hidden, size, dtype=dtype, device=device, scale=size**-0.5)
    x, residual = (_random(rows, n, dtype=dtype, device=device) for n in (size, shape.hidden))
    return _Case(
        "out_proj",
        _counted(rows, "row"),
        lambda copy: out_proj(x, weights[copy], None, residual, path="triton"),
        lambda: out_proj(x.double(), weights[0].double(), None, residual.double()),
        moved,
        copies,
    )


def _swiglu(shape: Geometry, dtype: torch.dtype, device: torch.device, rows: int) -> _Case:
    moved = 2 * shape.intermediate * shape.hidden * dtype.itemsize
    copies = _copies(moved)
    weights = _random(
        copies, 2 * shape.intermediate, shape.hidden, dtype=dtype, device=device, scale=shape.hidden**-0.5
    )
    norm, hidden = (_random(*n, shape.hidden, dtype=dtype, device=device) for n in ((), (rows,)))
    return _Case(
        "swiglu",
        _counted(rows, "row"),
        lambda copy: norm_swiglu(hidden, norm, weights[copy], EPS, path="triton"),
        lambda: norm_swiglu(hidden.double(), norm.double(), weights[0].double(), EPS),
        moved,
        copies,
    )


def _head(shape: Geometry, dtype: torch.dtype, device: torch.device, rows: int) -> _Case:
    rows = min(rows, 64)  # only last rows are asked for
    moved = shape.vocab * shape.hidden * dtype.itemsize
    copies = _copies(moved)
    heads = _random(copies, shape.vocab, shape.hidden, dtype=dtype, device=device, scale=shape.hidden**-0.5)
    norm, hidden = (_random(*n, shape.hidden, dtype=dtype, device=device) for n in ((), (rows,)))

    def run(copy: int) -> Tensor:
        logits = norm_head(hidden, norm, heads[copy], EPS, path="triton")
        if not copy:
            ids, finite = greedy(logits, path="triton")
            drawn, _ = sample(logits, _likeliest(rows, shape.vocab, device), path="triton")
            if not (torch.equal(ids, greedy(logits)[0]) and torch.equal(ids, drawn) and finite.all()):
                raise ValueError("the likeliest token is not that of torch")
        return logits

    return _Case(
        "head",
        _counted(rows, "row"),
        run,
        lambda: norm_head(hidden.double(), norm.double(), heads[0].double(), EPS),
        moved,
        copies,
    )


_MAKERS = (_norm_qkv, _attention, _out_proj, _swiglu, _head)

CASES = len(_MAKERS) * len(ROWS)
"""How many results `check` gives."""


def _likeliest(rows: int, vocab: int, device: torch.device) -> Choices:
    """Draw among one token."""
    choices = Choices.greedy(torch.zeros(rows, vocab, dtype=torch.bool, device=device))
    choices.shape[0] = choices.draws[0] = 1
    return choices


def _time(case: _Case) -> float:
    """Microseconds of a call in a CUDA graph over all copies of its memory."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run(1)
        with torch.cuda.graph(graph, stream=stream):
            for copy in range(1, case.copies):
                case.run(copy)
    torch.cuda.current_stream().wait_stream(stream)
    return median(_elapsed(graph.replay) for _ in range(7)) / (case.copies - 1)


def _elapsed(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source, target = torch.empty(2, 2**29, dtype=torch.uint8, device=device)
    times = sorted(_elapsed(lambda: target.copy_(source)) for _ in range(8))
    return float(2 * source.numel() / (times[1] * 1e-6))


def main(arguments: Sequence[str]) -> None:
    """Print a line of JSON per case; a second argument "quick" leaves times out."""
    torch.manual_seed(0)
    geometry = Geometry(**json.loads(arguments[0]))
    for result in check(geometry, torch.device("cuda"), timed="quick" not in arguments[1:]):
        print(json.dumps(asdict(result)), flush=True)  # noqa: T201 (the caller reads it)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
