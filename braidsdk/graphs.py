"""CUDA graphs of the model's forward pass: question and next tokens without a launch from the host per kernel.

A graph reads all that changes from tables and counters on the device, so one graph per number of rows serves every
context, and growing text needs no new one. Tokens are chosen on the device too: where all requests are greedy, the
likeliest alone; else by a graph of its own, which draws and counts repetitions for each request as it wants.

Everything runs on one stream, in the order of the calls: what a finished call's pages are used for next comes after its
last write.

Call everything here within `Engine.working()`.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from braidsdk.decoding import Row
from braidsdk.encode import Run, compute, compute_logits
from braidsdk.errors import PoolFullError
from braidsdk.kernels.attention.launch import Room, StaticPlan
from braidsdk.kernels.head import greedy
from braidsdk.kernels.measure import measuring
from braidsdk.kernels.paging import PagedSegment, Request, slots_of
from braidsdk.kernels.sample import Choices, sample
from braidsdk.models.base import Model, Step
from braidsdk.pool import Pool

_log = logging.getLogger(__name__)

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Requests that a graph computes the next token of; the smallest that holds them is taken."""

QUESTION_ROWS = (16, 32, 64, 128)
"""Tokens of a question that a graph computes; longer ones take a pass without a graph."""

MOST_ROWS = DECODE_ROWS[-1]

PREFILL_ROWS = (32, 512)
"""Tokens of the texts that `warm_up` computes as if they were registered."""

_KERNEL_NODE = 0
"""CU_GRAPH_NODE_TYPE_KERNEL of the CUDA driver."""


@dataclass
class _Captured:
    """A graph and the memory that it reads and writes.

    Attributes:
        graph: one pass.
        state: absolute positions, positions in their segment's frame, and for a question token ids and slots; int64
            [4, rows] or [2, rows].
        slots: where each token of a row's tail goes, int64 [rows, window]; of a decoding graph.
        chosen: ids and whether their logits are finite, int64 [2, rows with logits]; a decoding graph reads there what
            it goes on from.
        choices: how they are chosen; None takes the likeliest.
        wanted: the rows with logits, int64; a question's graph has one, to be set.
        plan: its attention.
    """

    graph: torch.cuda.CUDAGraph
    state: Tensor
    slots: Tensor | None
    chosen: Tensor
    choices: Choices | None
    wanted: Tensor
    plan: StaticPlan


class Graphs:
    """The captured passes of one model and pool, made when first needed."""

    def __init__(self, model: Model, pool: Pool) -> None:
        self._model, self._pool = model, pool
        self._captured: dict[tuple[str, int, bool], _Captured] = {}
        self._memory: tuple[int, torch.Size] | None = None
        self._room = Room()
        self._memory_pool: Any = None
        self._stream = torch.cuda.Stream(model.device)
        self._seen: Tensor | None = None
        self._slots: Tensor | None = None
        self.owner: object | None = None
        """Whose requests the decoding state is of."""

    def question(self, tokens: int, request: Request, row: Row) -> _Captured:
        """The pass for a request's question of so many tokens, its attention planned."""
        captured = self._ready("question", _bucket(QUESTION_ROWS, tokens), [request], [row])
        captured.wanted.fill_(tokens - 1)
        return captured

    def decoding(self, requests: Sequence[Request], rows: Sequence[Row]) -> _Captured:
        """The pass for the next token of these requests, its attention planned."""
        return self._ready("decoding", _bucket(DECODE_ROWS, len(rows)), requests, rows)

    @torch.inference_mode()
    def choose(self, logits: Tensor, row: Row) -> Tensor:
        """A token from the logits of a pass without a graph, [1, vocab_size]; as `_Captured.chosen`."""
        choices = None
        if not row.sampler.greedy:
            choices = Choices.greedy(torch.zeros_like(logits, dtype=torch.bool))
            _fill(choices, [row])
        chosen = torch.empty(2, 1, dtype=torch.int64, device=logits.device)
        _choose(logits, choices, chosen)
        return chosen

    @torch.inference_mode()
    def warm_up(self, requests: int, report: Callable[[int, int], None]) -> None:
        """Compile what registering, questions, and so many requests at once need, and capture their passes.

        Args:
            requests: at most `MOST_ROWS`.
            report: called with the passes made and those to be made: before the first, and after each.
        """
        sizes = [("question", rows) for rows in QUESTION_ROWS]
        sizes += [("decoding", rows) for rows in DECODE_ROWS if rows <= _bucket(DECODE_ROWS, requests)]
        work: list[Callable[[], object]] = [partial(self._prefill, tokens) for tokens in PREFILL_ROWS]
        work += [partial(self._get, kind, rows, drawn) for kind, rows in sizes for drawn in (False, True)]
        for done, make in enumerate(work):
            report(done, len(work))
            make()
        report(len(work), len(work))
        torch.cuda.current_stream(self._model.device).synchronize()

    def _prefill(self, tokens: int) -> None:
        pages = self._pool.allocate(tokens)
        try:
            compute(self._model, self._pool, [Run((0,) * tokens, (), pages, 0, 0)])
        finally:
            self._pool.release(pages)

    def launches(self) -> dict[str, int]:
        """Kernels that a replay of each captured pass launches, by what it computes."""
        return {
            f"{kind} of {rows}{', drawn' if drawn else ''}": _kernels(captured.graph)
            for (kind, rows, drawn), captured in sorted(self._captured.items())
        }

    def _ready(self, kind: str, size: int, requests: Sequence[Request], rows: Sequence[Row]) -> _Captured:
        drawn = not all(row.sampler.greedy for row in rows)
        while True:
            captured = self._get(kind, size, drawn)
            wanted = captured.plan.load(requests)
            if wanted is None:
                break
            self._room = wanted  # more segments than ever before: all graphs get larger tables
            self._captured.clear()
        if captured.choices:
            _fill(captured.choices, rows)
        return captured

    def _mind_the_pool(self) -> None:
        """Forget what was captured if the pool's memory lies elsewhere now."""
        memory = (self._pool.kv.data_ptr(), self._pool.kv.shape)
        if self._memory != memory:
            self._captured.clear()
            self._memory = memory

    def _get(self, kind: str, size: int, drawn: bool) -> _Captured:
        self._mind_the_pool()
        if (kind, size, drawn) not in self._captured:
            self._captured[kind, size, drawn] = self._capture(kind, size, drawn)
        return self._captured[kind, size, drawn]

    def _choices(self, rows: int) -> Choices:
        """For a graph; all graphs share what was seen: one set of requests is in their memory at a time."""
        vocab, device = self._model.config.vocab_size, self._model.device
        if self._seen is None:
            self._seen = torch.zeros(MOST_ROWS, vocab, dtype=torch.bool, device=device)
        return Choices.greedy(self._seen[:rows])

    @torch.inference_mode()
    def _capture(self, kind: str, rows: int, drawn: bool) -> _Captured:
        started = perf_counter()
        model, device, config = self._model, self._model.device, self._model.config
        decoding = kind == "decoding"
        if decoding and self._slots is None:  # one for all graphs, as what was seen
            self._slots = torch.empty(MOST_ROWS, config.window, dtype=torch.int64, device=device)
        tail_slots = self._slots[:rows] if decoding and self._slots is not None else None
        state = torch.zeros(2 if decoding else 4, rows, dtype=torch.int64, device=device)
        wanted = torch.arange(rows if decoding else 1, device=device)
        chosen = torch.zeros(2, len(wanted), dtype=torch.int64, device=device)
        choices = self._choices(len(wanted)) if drawn else None
        cos, sin = model.rotary.table(config.window)
        plan = StaticPlan(
            rows=rows,
            positions=state[0],
            cos=cos,
            sin=sin,
            group=config.q_heads // config.kv_heads,
            kv_heads=config.kv_heads,
            page_size=self._pool.page_size,
            room=self._room,
            shared=not decoding or rows == 1,
        )

        def run() -> None:
            frames = state[1]
            if tail_slots is None:
                token_ids, slots = state[2:]
            else:
                token_ids, slots = chosen[0], tail_slots.gather(1, frames[:, None])[:, 0]
            step = Step(cos[frames], sin[frames], (plan.plan,))
            logits = model.compute(token_ids, slots, step, self._pool.kv, wanted)
            if logits is None:
                raise RuntimeError("the model gave no logits although rows were asked for")
            _choose(logits, choices, out=chosen)
            if decoding:
                state.add_(1)

        (state[3] if tail_slots is None else tail_slots).fill_(-1)
        if self._memory_pool is None:
            self._memory_pool = torch.cuda.graph_pool_handle()
        graph = _record(run, self._stream, self._memory_pool)
        if decoding:
            self.owner = None
        _log.debug("captured a %s pass of %d rows in %.0f ms", kind, rows, (perf_counter() - started) * 1e3)
        return _Captured(graph, state, tail_slots, chosen, choices, wanted, plan)


def _record(run: Callable[[], None], stream: torch.cuda.Stream, memory_pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches on the current stream; `stream` is for the recording alone."""
    run()  # compiles, and makes what a graph must not own; in order with what other models of the process run
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # its nodes can be counted
    # What other threads of the application do on the device must not end the capture.
    with torch.cuda.graph(graph, pool=memory_pool, stream=stream, capture_error_mode="thread_local"):
        run()
    graph.instantiate()
    return graph


class _Pending:
    """Results that are on their way to the host."""

    def __init__(self, rows: Sequence[Row], chosen: Tensor) -> None:
        self.rows = list(rows)
        self._host = torch.empty(chosen.shape, dtype=torch.int64, pin_memory=True)
        self._host.copy_(chosen, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def take(self) -> None:
        """Wait for them, and give each request its own."""
        self._there.synchronize()
        ids, finite = self._host.tolist()
        for at, row in enumerate(self.rows):
            row.take(ids[at], bool(finite[at]))


class GraphDecoder:
    """`decoding.Decoder` over CUDA graphs. While the host looks at tokens, the next ones are computed."""

    def __init__(self, graphs: Graphs, model: Model, pool: Pool) -> None:
        self._graphs, self._model, self._pool = graphs, model, pool
        self._rows: list[Row] = []
        self._pending: _Pending | None = None
        self._captured: _Captured | None = None

    @torch.inference_mode()
    def admit(self, row: Row, tail: Sequence[int]) -> None:
        count = len(tail)
        if count > QUESTION_ROWS[-1]:
            chosen = self._graphs.choose(compute_logits(self._model, self._pool, [row.run(tail)]), row)
        else:
            run = row.run(tail)
            captured = self._graphs.question(count, _request(run, slice(0, count)), row)
            size, page_size, pages = captured.state.shape[1], self._pool.page_size, run.pages.tolist()
            frames, unused = range(run.start, run.start + count), [0] * (size - count)
            state = (
                *(*(run.origin + frame for frame in frames), *unused),
                *(*frames, *unused),
                *(*run.token_ids, *unused),
                *(
                    *(pages[frame // page_size] * page_size + frame % page_size for frame in frames),
                    *[-1] * len(unused),
                ),
            )
            captured.state.copy_(torch.tensor(state).view(4, size).pin_memory(), non_blocking=True)
            captured.graph.replay()
            chosen = captured.chosen
        _Pending([row], chosen).take()
        row.done += count
        self._rows.append(row)
        self._graphs.owner = None

    @torch.inference_mode()
    def next(self, row: Row) -> int:
        while row.waits:
            self._step()
        return row.pop()

    def retire(self, row: Row) -> None:
        if row in self._rows:
            self._rows.remove(row)
            self._graphs.owner = None

    def _step(self) -> None:
        if self._pending is None:
            self._launch()
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("no request is running")
        ahead = self._graphs.owner is self and all(
            each.failure is None and each.done < each.reserved for each in self._rows
        )
        if ahead:
            self._launch()
        pending.take()

    def _launch(self) -> None:
        """Start the next token of every request."""
        if self._graphs.owner is not self:
            self._load()
        captured = self._captured
        if captured is None:
            raise RuntimeError("no request is running")
        captured.graph.replay()
        for row in self._rows:
            row.done += 1
        self._pending = _Pending(self._rows, captured.chosen)

    def _load(self) -> None:
        """Put the requests into the graph's memory."""
        self._rows = [row for row in self._rows if row.failure is None]
        requests = [
            _request(row.run((row.last,)), slice(at, at + 1), row.reserved) for at, row in enumerate(self._rows)
        ]
        captured = self._captured = self._graphs.decoding(requests, self._rows)
        if captured.slots is None:
            raise RuntimeError("no graph of the next token was given")
        going = torch.zeros(3, captured.state.shape[1], dtype=torch.int64)
        longest = max(row.reserved for row in self._rows)
        slots = torch.full((len(self._rows), longest), -1, dtype=torch.int64)
        for at, row in enumerate(self._rows):
            going[:, at] = torch.tensor((row.origin + row.done, row.done, row.last))
            slots[at, : row.reserved] = slots_of(row.pages, 0, row.reserved, self._pool.page_size)
        pinned = going.pin_memory()
        captured.state.copy_(pinned[:2], non_blocking=True)
        captured.chosen[0].copy_(pinned[2], non_blocking=True)
        captured.slots.fill_(-1)
        captured.slots[: len(slots), :longest] = slots.pin_memory().to(captured.slots.device, non_blocking=True)
        self._graphs.owner = self


def workspace_bytes(model: Model) -> int:
    """What a model's graphs take at most: activations, tables, partial results of attention, slots, what was seen.

    Twice what the largest pass works in: graphs share one such memory, and a pass runs once before it is captured.
    """
    config, room, itemsize = model.config, Room(), model.dtype.itemsize
    width = config.q_heads * config.head_dim
    per_token = 8 * config.hidden_size + 4 * config.intermediate_size + 6 * width
    work = QUESTION_ROWS[-1] * per_token * itemsize
    work += room.partials * (width + config.q_heads) * 4
    work += MOST_ROWS * config.vocab_size * 5
    table = 4 * (4 * (room.items + room.spans + room.frames) + 2 * room.rows + room.pages)
    graphs = 2 * (len(DECODE_ROWS) + len(QUESTION_ROWS))
    kept = config.window * (config.head_dim * 4 + MOST_ROWS * 8) + MOST_ROWS * config.vocab_size
    return 2 * work + graphs * (table + GRAPH_BYTES) + kept + LIBRARY_BYTES


GRAPH_BYTES = 2 * 2**20
"""Of the driver, for the nodes of one graph, and rounding of the allocator."""

LIBRARY_BYTES = 64 * 2**20
"""Of libraries' workspaces, and of the kernels' code."""


def runs_on_graphs(model: Model) -> bool:
    """Whether all of a model's operations run on Triton's kernels, which graphs are captured of; measured one by one,
    they run without."""
    return model.device.type == "cuda" and model.paths.triton and not measuring()


def left_for_entries(model: Model, budget_bytes: int) -> int:
    """What remains of a memory budget for KV entries beside a model's graphs, if it runs on such.

    Raises:
        PoolFullError: nothing does.
    """
    if not runs_on_graphs(model):
        return budget_bytes
    taken = workspace_bytes(model)
    if budget_bytes <= taken:
        raise PoolFullError(
            f"CUDA graphs and their workspace take {taken / 1e6:,.1f} MB; the memory budget is "
            f"{budget_bytes / 1e6:,.1f} MB. Open the Braid with a larger pool_bytes, free memory on the device, or use "
            "kernels='torch'."
        )
    return budget_bytes - taken


def _choose(logits: Tensor, choices: Choices | None, out: Tensor) -> None:
    """Ids, and whether logits are finite, into `out`, int64 [2, rows]."""
    ids, finite = sample(logits, choices, path="triton") if choices else greedy(logits, path="triton")
    out[0] = ids
    out[1] = finite


def _fill(choices: Choices, rows: Sequence[Row]) -> None:
    """Say how these requests choose their next tokens; further rows are greedy."""
    shape = torch.zeros(choices.shape.shape, dtype=torch.float64)
    draws = torch.zeros(choices.draws.shape, dtype=torch.int64)
    shape[1], shape[3] = 1.0, 1.0
    for at, row in enumerate(rows):
        params, seed = row.sampler.params, row.sampler.seed
        shape[:, at] = torch.tensor(
            (params.temperature, params.top_p, params.min_p, params.repetition_penalty), dtype=torch.float64
        )
        draws[:, at] = torch.tensor((params.top_k, seed - (seed >> 63 << 64), row.sampler.chosen))
        if params.repetition_penalty != 1.0:
            choices.seen[at] = False
            choices.seen[at, row.sampler.said.to(choices.seen.device)] = True
    choices.shape.copy_(shape.pin_memory(), non_blocking=True)
    choices.draws.copy_(draws.pin_memory(), non_blocking=True)


def _kernels(graph: torch.cuda.CUDAGraph) -> int:
    """Kernel nodes of a graph, as the CUDA driver counts them."""
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
    count, kind = ctypes.c_size_t(), ctypes.c_int()
    failed = driver.cuGraphGetNodes(handle, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    failed = failed or driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count))
    kernels = 0
    for node in nodes:
        failed = failed or driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
        kernels += kind.value == _KERNEL_NODE
    if failed:
        raise RuntimeError(f"the CUDA driver could not list a graph's nodes: error {failed}")
    return kernels


def _request(run: Run, rows: slice, reserved: int | None = None) -> Request:
    """What rows see; of the tail as much as is reserved: the kernel looks at positions."""
    stop = reserved or run.start + len(run.token_ids)
    return Request(rows, (*run.context, PagedSegment(run.pages, 0, stop, run.origin)))


def _bucket(sizes: Sequence[int], rows: int) -> int:
    return next(size for size in sizes if size >= rows)
