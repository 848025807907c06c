"""Each Triton kernel against its float64 reference, at a model's own shapes, and how fast it is.

    python -m braidsdk.kernels.selftest '{"hidden": 1024, "intermediate": 3072, "q_heads": 16, "kv_heads": 8,
        "head_dim": 128, "vocab": 151936, "dtype": "bfloat16"}'

Run it in processes of its own: an error on the device can't be recovered from within the process that met it. Nearly
all of the time goes into compiling, so several share the cases: each reads the number of its next one from stdin, a
byte; where stdin is a terminal, it tries all. Prints a line of JSON per case.

What `Graphs.warm_up` launches is among the cases, so that it finds all of it in Triton's cache.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from braidsdk.kernels.attention.launch import TritonPlan, plan_for_triton
from braidsdk.kernels.attention.live import LivePlan
from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.attention.static import Room, StaticPlan, changed
from braidsdk.kernels.backends import Geometry
from braidsdk.kernels.head import greedy, norm_head
from braidsdk.kernels.head.reference import norm_head_reference
from braidsdk.kernels.key_weights import plan_key_weights
from braidsdk.kernels.key_weights.reference import largest_weights_reference
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.norm_qkv.reference import norm_qkv_reference
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.out_proj.reference import out_proj_reference
from braidsdk.kernels.paging import PagedSegment, Request, Shift
from braidsdk.kernels.rope import RotaryTable
from braidsdk.kernels.sample import Choices, sample
from braidsdk.kernels.shift import apply_shifts, plan_shifts
from braidsdk.kernels.shift.reference import apply_shifts_reference
from braidsdk.kernels.step import begin_step, end_step
from braidsdk.kernels.step.reference import begin_step_reference
from braidsdk.kernels.swiglu import norm_swiglu
from braidsdk.kernels.swiglu.reference import norm_swiglu_reference
from braidsdk.kernels.weight import GROUP, Int8, dense, in_one_piece, quantised

PAGE = 64
EPS = 1e-6
ROWS = (1, 2, 5, 32, 64, 300)
"""A decoded token, batches of them, questions, a prefill: every shape that a kernel has."""

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
"""Relative error (root of the summed squares) that rounding alone stays below."""

COLD_BYTES = 256e6
"""Weights and memory in turn that no L2 cache holds."""


@dataclass(frozen=True)
class Result:
    """One kernel at one shape.

    Attributes:
        op: the operation, by its name in `kernels.backends.Backends`.
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
class Bench:
    """Where cases are made, and of what."""

    shape: Geometry
    device: torch.device
    timed: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.shape.torch_dtype

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.empty(*size, dtype=self.dtype, device=self.device).normal_(std=scale)

    def weight(self, out: int, size: int) -> Tensor | Int8:
        """A random weight [out, size], in the form that the model has."""
        made = self.random(out, size, scale=size**-0.5)
        return quantised(made) if self.shape.int8 else made

    def weight_bytes(self, out: int, size: int) -> int:
        """Of such a weight."""
        return out * size + out * -(-size // GROUP) * 4 if self.shape.int8 else out * size * self.dtype.itemsize

    def rotary(self, dtype: torch.dtype) -> RotaryTable:
        """Cosines and sines for heads of this size."""
        inv_freq = 1.0 / (1e6 ** (torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim))
        return RotaryTable(inv_freq, 1.0, dtype, self.device)

    def copies(self, moved: int) -> int:
        """How many make `moved` bytes of memory cold when they are used in turn."""
        return max(2, min(64, int(COLD_BYTES / max(moved, 1)) + 1)) if self.timed else 1


@dataclass(frozen=True)
class _Call:
    """A call to be checked and timed: `run(copy)` uses copy `copy` of its cold memory, `truth` is of copy 0."""

    run: Callable[[int], Tensor]
    truth: Callable[[], Tensor]
    moved: int
    copies: int


@dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        op: the operation, by its name in `kernels.backends.Backends`.
        name: what is computed.
        make: the call, and its memory.
    """

    op: str
    name: str
    make: Callable[[Bench], _Call]


def check(bench: Bench, case: Case, ceiling: float) -> Result:
    """Try one.

    Args:
        bench: for what, and where.
        case: one of `CASES`.
        ceiling: bytes per second of a large copy.

    Raises:
        RuntimeError: the device met an error that this process can't recover from.
    """
    limit = LIMITS[bench.dtype]
    try:
        call = case.make(bench)
        error = _distance(call.run(0), call.truth())
        trouble = "" if error <= limit else f"relative error {error:.1e}, expected at most {limit:.0e}"
        result = Result(case.op, case.name, error, limit, trouble=trouble)
        if bench.timed and not trouble:
            us = _time(call)
            result = replace(result, us=us, bandwidth=call.moved / us * 1e6 / ceiling)
    except Exception as problem:  # whatever it is, the answer is that this kernel does not run here
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)  # raises again what would fail all further cases
        last = traceback.format_exception_only(problem)[-1].strip()
        return Result(case.op, case.name, None, limit, trouble=last[:300])
    return result


def case_bytes(geometry: Geometry) -> int:
    """What a process that tries cases takes of the device's memory at most, untimed: an LM head beside all else."""
    return 2 * 2**30 + geometry.vocab * geometry.hidden * geometry.torch_dtype.itemsize


def _distance(got: Tensor, truth: Tensor) -> float:
    error = float((got.double() - truth).norm() / truth.norm())
    return error if error == error else float("inf")


def _wide(weight: Tensor | Int8) -> Tensor:
    return dense(weight, torch.float64).double()


def _wide_parts(weight: Tensor | Int8) -> Iterator[Tensor]:
    """The same, some rows at a time."""
    if isinstance(weight, Int8):
        pairs = zip(weight.values.split(2**14), weight.scales.split(2**14), strict=True)
        return (_wide(Int8(values, scales)) for values, scales in pairs)
    return (part.double() for part in weight.split(2**14))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _norm_qkv(bench: Bench, rows: int) -> _Call:
    shape, dtype, device = bench.shape, bench.dtype, bench.device
    outs = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
    moved = bench.weight_bytes(outs, shape.hidden)
    copies = bench.copies(moved)
    weights = [
        NormQKVWeights(
            norm=bench.random(shape.hidden),
            qkv=bench.weight(outs, shape.hidden),
            bias=bench.random(outs) if shape.qkv_bias else None,
            q_norm=bench.random(shape.head_dim) if shape.qk_norm else None,
            k_norm=bench.random(shape.head_dim) if shape.qk_norm else None,
        )
        for _ in range(copies)
    ]
    hidden = bench.random(rows, shape.hidden)
    angles = torch.rand(rows, shape.head_dim // 2, device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    kv = torch.zeros(2, -(-rows // PAGE), shape.kv_heads, PAGE, shape.head_dim, dtype=dtype, device=device)
    slots = torch.arange(rows, device=device)

    def run(copy: int) -> Tensor:
        queries = norm_qkv(hidden, weights[copy], EPS, cos, sin, kv, slots, backend="triton")
        return queries if copy else torch.cat((queries.flatten(), kv.flatten()))

    def truth() -> Tensor:
        own = weights[0]
        others = (None if each is None else each.double() for each in (own.bias, own.q_norm, own.k_norm))
        wide = NormQKVWeights(own.norm.double(), _wide(in_one_piece(own.qkv)), *others)
        memory, turn = torch.zeros_like(kv, dtype=torch.float64), angles.double()
        queries = norm_qkv_reference(hidden.double(), wide, EPS, turn.cos(), turn.sin(), memory, slots)
        return torch.cat((queries.flatten(), memory.flatten()))

    return _Call(run, truth, moved, copies)


def _step(bench: Bench, rows: int) -> _Call:
    """What the first layer reads of each row, its slot given or looked up; and where rows are after it."""
    shape, device = bench.shape, bench.device
    moved = 2 * rows * shape.hidden * bench.dtype.itemsize
    copies = bench.copies(moved)
    embeddings, angles = bench.random(copies, 2 * rows, shape.hidden), torch.rand(PAGE, shape.head_dim // 2).to(device)
    token_ids, frames = torch.arange(1, 2 * rows, 2, device=device), torch.arange(rows, device=device) % PAGE
    frames[0] = -1  # a row that holds nothing
    table = torch.arange(rows * PAGE, device=device).view(rows, -1)

    def run(copy: int) -> Tensor:
        """Which tensors agree with torch: they are copied, so all of them do to the bit."""
        if copy:
            return begin_step(token_ids, frames, table, embeddings[copy], angles, angles, backend="triton")[0]
        right = []
        for slots in (frames, table):
            given = token_ids, frames, slots, embeddings[0], angles, angles
            for ours, torchs in zip(begin_step(*given, backend="triton"), begin_step_reference(*given), strict=True):
                right.append((ours == torchs).all())
        state = frames.repeat(2, 1)
        end_step(state, backend="triton")
        return torch.stack([*right, (state == frames + (frames >= 0)).all()])

    return _Call(run, lambda: torch.ones(9, dtype=torch.float64, device=device), moved, copies)


def _shifts(bench: Bench, tokens: Sequence[int]) -> _Call:
    """A shift for each number of tokens."""
    shape, device, total = bench.shape, bench.device, sum(tokens)
    moved = 2 * 2 * total * shape.kv_heads * shape.head_dim * bench.dtype.itemsize
    copies = bench.copies(moved)
    pages = -(-(2 * total + len(tokens)) // PAGE)
    kv = bench.random(copies, 2, pages, shape.kv_heads, PAGE, shape.head_dim)
    slots = torch.randperm(pages * PAGE)
    parts = list(zip(slots[:total].split(list(tokens)), slots[total : 2 * total].split(list(tokens)), strict=True))
    targets = slots[2 * total :][: len(tokens)]
    shifts = [Shift(*part, int(targets[at]), 300 * at, 0.8) for at, part in enumerate(parts)]
    planned, wide = (plan_shifts(shifts, bench.rotary(dtype)) for dtype in (torch.float32, torch.float64))
    clean, on_device = kv[0].double(), targets.to(device)

    def run(copy: int) -> Tensor:
        apply_shifts(kv[copy], planned, backend="triton")
        return kv[copy][:, on_device // PAGE, :, on_device % PAGE]

    def truth() -> Tensor:
        apply_shifts_reference(clean, wide)
        return clean[:, on_device // PAGE, :, on_device % PAGE]

    return _Call(run, truth, moved, copies)


def _attention(bench: Bench, rows: int, users: int, plan: "_Plan", *, changed: bool = False) -> _Call:
    """`changed`: every other request has hidden keys and shifts."""
    shape, device = bench.shape, bench.device
    lengths = (500, 1, 64, 2048, 37, 1100) if rows < 300 else (256, 300)
    requests: list[Request] = []
    positions: list[int] = []
    page = 0
    shared, origin = [], 0
    for tokens in lengths:
        pages = torch.arange(page, page + -(-tokens // PAGE))
        shared.append(PagedSegment(pages, 0, tokens, origin))
        origin, page = origin + tokens, page + len(pages)
    for user in range(users):
        own, seen = torch.arange(page, page + 1), shared
        page += 1
        if changed and user % 2 == 0:
            slot, page = page * PAGE, page + 1
            seen = [
                replace(each, hidden=torch.rand(each.stop) < 0.3, shift=slot + at) for at, each in enumerate(shared)
            ]
        answered = 9 + user % 40
        end = origin if rows >= 300 else origin + answered
        positions += range(end - rows // users, end)
        tail = [] if rows >= 300 else [PagedSegment(own, 0, answered, origin)]
        at = slice(len(positions) - rows // users, len(positions))
        requests.append(Request(at, (*seen, *tail)))
    moved = 2 * page * PAGE * shape.kv_heads * shape.head_dim * bench.dtype.itemsize
    copies = bench.copies(moved)
    kv = bench.random(copies, 2, page, shape.kv_heads, PAGE, shape.head_dim)
    queries = bench.random(rows, shape.q_heads, shape.head_dim)
    scale, limit, at_rows = shape.head_dim**-0.5, max(positions) + 1, torch.tensor(positions, device=device)
    planned = plan(shape, at_rows, requests, bench.rotary(torch.float32), limit)

    def truth() -> Tensor:
        wide = bench.rotary(torch.float64)
        plans = [made for each in requests if (made := plan_request(at_rows, each, wide, limit, PAGE))]
        return cascade_attention_reference(queries.double(), plans, kv[0].double(), scale)

    return _Call(lambda copy: planned.attend(queries, kv[copy], scale), truth, moved, copies)


def _key_weights(bench: Bench, rows: int) -> _Call:
    """Of segments with and without hidden keys and shifts."""
    shape, device = bench.shape, bench.device
    lengths, segments, page, origin = (500, 1, 700), [], 0, 0
    for at, tokens in enumerate(lengths):
        pages = torch.arange(page, page + -(-tokens // PAGE))
        hidden, shift = (torch.rand(tokens) < 0.3, len(lengths)) if at == 0 else (None, None)
        segments.append(PagedSegment(pages, 0, tokens, origin, hidden, shift))
        origin, page = origin + tokens, page + len(pages)
    moved = page * PAGE * shape.kv_heads * shape.head_dim * bench.dtype.itemsize
    copies = bench.copies(moved)
    kv = bench.random(copies, 2, page, shape.kv_heads, PAGE, shape.head_dim)
    queries = bench.random(rows, shape.q_heads, shape.head_dim)
    positions, request = torch.arange(origin - rows, origin, device=device), Request(slice(0, rows), tuple(segments))
    planned = plan_key_weights(
        positions,
        request,
        bench.rotary(torch.float32),
        limit=origin,
        page_size=PAGE,
        group=shape.q_heads // shape.kv_heads,
        kv_heads=shape.kv_heads,
        dtype=bench.dtype,
        backend="triton",
    )
    scale = shape.head_dim**-0.5

    def truth() -> Tensor:
        seen = plan_request(positions, request, bench.rotary(torch.float64), origin, PAGE)
        if seen is None:
            raise RuntimeError("rows see nothing")
        return largest_weights_reference(queries.double(), seen, kv[0].double(), scale)

    return _Call(lambda copy: planned.attend(queries, kv[copy], scale)[1], truth, moved, copies)


_Plan = Callable[[Geometry, Tensor, Sequence[Request], RotaryTable, int], TritonPlan]
"""Plans attention of rows at these positions, all below the last argument."""


def _pass(
    shape: Geometry, positions: Tensor, requests: Sequence[Request], rotary: RotaryTable, limit: int
) -> TritonPlan:
    """As a pass without a graph does."""
    group = shape.q_heads // shape.kv_heads
    return plan_for_triton(
        positions,
        requests,
        rotary,
        limit=limit,
        page_size=PAGE,
        group=group,
        kv_heads=shape.kv_heads,
        dtype=shape.torch_dtype,
    )


def _questions(
    shape: Geometry, positions: Tensor, requests: Sequence[Request], rotary: RotaryTable, limit: int
) -> TritonPlan:
    """As graphs of one question, and of several, do."""
    cos, sin = rotary.table(limit)
    plan = StaticPlan(
        rows=len(positions),
        positions=positions,
        cos=cos,
        sin=sin,
        group=shape.q_heads // shape.kv_heads,
        kv_heads=shape.kv_heads,
        page_size=PAGE,
        room=Room(),
        changes=changed(requests),
    )
    if plan.load(requests):
        raise ValueError("the tables of a graph are too small for the self-test")
    return plan.plan


def _batch(
    shape: Geometry, positions: Tensor, requests: Sequence[Request], rotary: RotaryTable, limit: int
) -> TritonPlan:
    """As graphs of a running batch do, a row for each request."""
    live = LivePlan(
        slots=max(64, len(positions)),
        group=shape.q_heads // shape.kv_heads,
        kv_heads=shape.kv_heads,
        page_size=PAGE,
        device=positions.device,
    )
    for slot, request in enumerate(requests):
        if live.join(slot, request.segments):
            raise ValueError("the tables of a running batch are too small for the self-test")
    live.upload()
    return live.plan(positions, *rotary.table(limit), changes=live.changes)


def _running(bench: Bench, size: int, *, changed: bool = False) -> _Call:
    """Attention of as many requests as make products of that size."""
    rows = max(2, size * bench.shape.kv_heads // bench.shape.q_heads)
    return _attention(bench, rows, rows, _batch, changed=changed)


def _out_proj(bench: Bench, rows: int, follows: str) -> _Call:
    shape = bench.shape
    size = shape.intermediate if follows == "swiglu" else shape.q_heads * shape.head_dim
    moved = bench.weight_bytes(shape.hidden, size)
    copies = bench.copies(moved)
    weights = [bench.weight(shape.hidden, size) for _ in range(copies)]
    x, residual = (bench.random(rows, n) for n in (size, shape.hidden))
    return _Call(
        lambda copy: out_proj(x, weights[copy], None, residual, backend="triton"),
        lambda: out_proj_reference(x.double(), _wide(weights[0]), None, residual.double()),
        moved,
        copies,
    )


def _swiglu(bench: Bench, rows: int) -> _Call:
    shape = bench.shape
    moved = bench.weight_bytes(2 * shape.intermediate, shape.hidden)
    copies = bench.copies(moved)
    weights = [bench.weight(2 * shape.intermediate, shape.hidden) for _ in range(copies)]
    norm, hidden = (bench.random(*n, shape.hidden) for n in ((), (rows,)))
    return _Call(
        lambda copy: norm_swiglu(hidden, norm, weights[copy], EPS, backend="triton"),
        lambda: norm_swiglu_reference(hidden.double(), norm.double(), _wide(weights[0]), EPS),
        moved,
        copies,
    )


def _head(bench: Bench, rows: int) -> _Call:
    shape = bench.shape
    moved = bench.weight_bytes(shape.vocab, shape.hidden)
    copies = bench.copies(moved)
    heads = [bench.weight(shape.vocab, shape.hidden) for _ in range(copies)]
    norm, hidden = (bench.random(*n, shape.hidden) for n in ((), (rows,)))

    def truth() -> Tensor:
        parts = _wide_parts(heads[0])  # all of it in float64 would be what takes the most memory
        return torch.cat([norm_head_reference(hidden.double(), norm.double(), part, EPS) for part in parts], dim=1)

    return _Call(lambda copy: norm_head(hidden, norm, heads[copy], EPS, backend="triton"), truth, moved, copies)


def _choice(bench: Bench) -> _Call:
    """The likeliest token of one row, and of each of many, by both kernels that find it."""
    shape, device, rows = bench.shape, bench.device, ROWS[-2]
    moved = rows * shape.vocab * 4
    copies = bench.copies(moved)
    logits = torch.randn(copies, rows, shape.vocab, device=device)
    choices = Choices.greedy(torch.zeros(rows, shape.vocab, dtype=torch.bool, device=device))
    choices.shape[0] = choices.draws[0] = 1  # draw among one token
    first = Choices(choices.shape[:, :1].contiguous(), choices.draws[:, :1].contiguous(), choices.seen[:1])

    likeliest = greedy(logits[0])[0]

    def run(copy: int) -> Tensor:
        """Where all agree with torch."""
        of, one = logits[copy], logits[copy, :1]
        if copy:
            return sample(of, choices, backend="triton")[0]
        right = [
            finite * (ids == likeliest)
            for ids, finite in (greedy(of, backend="triton"), sample(of, choices, backend="triton"))
        ]
        right += [
            finite * (ids == likeliest[:1])
            for ids, finite in (greedy(one, backend="triton"), sample(one, first, backend="triton"))
        ]
        return torch.cat(right)

    return _Call(run, lambda: torch.ones(2 * rows + 2, dtype=torch.float64, device=device), moved, copies)


def _of(rows: int, users: int = 1) -> str:
    return f"{_counted(rows, 'row')} of {_counted(users, 'request')}"


CASES = (
    Case("head", "choice of tokens", _choice),
    Case("head", "beginning and end of a step", partial(_step, rows=ROWS[-2])),
    *(Case("head", _counted(rows, "row"), partial(_head, rows=rows)) for rows in ROWS[:-1]),  # last rows are few
    *(
        Case("attention", _of(rows, users), partial(_attention, rows=rows, users=users, plan=_pass))
        for rows, users in ((1, 1), (2, 1), (5, 5), (32, 1), (64, 1), (300, 1))
    ),
    *(
        Case(
            "attention", f"{_of(rows, users)}, in a graph", partial(_attention, rows=rows, users=users, plan=_questions)
        )
        for rows, users in ((1, 1), (16, 1), (128, 16))
    ),
    *(
        Case("attention", f"running batch, products of {size} rows", partial(_running, size=size))
        for size in (16, 32, 64)
    ),
    *(
        Case(
            "attention",
            f"{_of(rows, 1)}{where}, with hidden keys and shifts",
            partial(_attention, rows=rows, users=1, plan=plan, changed=True),
        )
        for rows, where, plan in (
            (64, "", _pass),
            (300, "", _pass),
            (1, ", in a graph", _questions),
            (16, ", in a graph", _questions),
        )
    ),
    *(
        Case(
            "attention",
            f"running batch, products of {size} rows, with hidden keys and shifts",
            partial(_running, size=size, changed=True),
        )
        for size in (16, 32, 64)
    ),
    Case("attention", "largest weight of each key", partial(_key_weights, rows=32)),
    *(Case("norm_qkv", _counted(rows, "row"), partial(_norm_qkv, rows=rows)) for rows in ROWS),
    Case("norm_qkv", "3 shifts", partial(_shifts, tokens=(77, 1, 500))),
    *(
        Case("out_proj", f"{_counted(rows, 'row')} after {follows}", partial(_out_proj, rows=rows, follows=follows))
        for follows in ("attention", "swiglu")
        for rows in ROWS[:-1]  # more go to torch
    ),
    *(Case("swiglu", _counted(rows, "row"), partial(_swiglu, rows=rows)) for rows in ROWS),
)
"""All that is tried, what takes longest to compile first."""


def _time(call: _Call) -> float:
    """Microseconds of a call in a CUDA graph over all copies of its memory."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.run(1)
        with torch.cuda.graph(graph, stream=stream):
            for copy in range(1, call.copies):
                call.run(copy)
    torch.cuda.current_stream().wait_stream(stream)
    return median(_elapsed(graph.replay) for _ in range(7)) / (call.copies - 1)


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


def _numbers() -> Iterator[int]:
    """Of the cases for this process."""
    if sys.stdin.isatty():
        yield from range(len(CASES))
        return
    while taken := os.read(sys.stdin.fileno(), 1):
        yield taken[0]


def main(arguments: Sequence[str]) -> None:
    """Print a line of JSON per case; a second argument "quick" leaves times out."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    bench = Bench(Geometry(**json.loads(arguments[0])), device, timed="quick" not in arguments[1:])
    ceiling = _copy_rate(device) if bench.timed else 0.0
    for number in _numbers():
        result = check(bench, CASES[number], ceiling)
        line = json.dumps({"number": number, **asdict(result)})
        os.write(sys.stdout.fileno(), f"\n{line}\n".encode())  # in one piece: other processes write there too
        torch.cuda.empty_cache()  # several processes share the device's memory


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
