"""CUDA graphs of the model's forward pass: question and next tokens without a launch from the host per kernel.

A graph reads all that changes from tables and counters on the device, so one graph per number of rows serves every
context, and growing text needs no new one. Everything runs on one stream, in the order of the calls: what a finished
call's pages are used for next comes after its last write.

Call everything here within `Engine.working()`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from braidsdk.decoding import Row
from braidsdk.encode import Run, compute_logits
from braidsdk.kernels.attention.launch import Room, StaticPlan
from braidsdk.kernels.head import greedy
from braidsdk.kernels.paging import PagedSegment, Request, slots_of
from braidsdk.models.base import Model, Step
from braidsdk.pool import Pool

_log = logging.getLogger(__name__)

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Requests that a graph computes the next token of; the smallest that holds them is taken."""

QUESTION_ROWS = (16, 32, 64, 128)
"""Tokens of a question that a graph computes; longer ones take a pass without a graph."""

MOST_ROWS = DECODE_ROWS[-1]


@dataclass
class _Captured:
    """A graph and the memory that it reads and writes.

    Attributes:
        graph: one pass.
        state: token ids, absolute positions, positions in their segment's frame, slots; int64 [4, rows].
        tails: pages of each row's tail, int64 [rows, pages]; of a decoding graph.
        chosen: ids and whether their logits are finite, int64 [2, rows with logits].
        logits: [rows with logits, vocab_size].
        wanted: the rows with logits, int64; a question's graph has one, to be set.
        plan: its attention.
    """

    graph: torch.cuda.CUDAGraph
    state: Tensor
    tails: Tensor
    chosen: Tensor
    logits: Tensor
    wanted: Tensor
    plan: StaticPlan


class Graphs:
    """The captured passes of one model and pool, made when first needed."""

    def __init__(self, model: Model, pool: Pool) -> None:
        self._model, self._pool = model, pool
        self._captured: dict[tuple[str, int], _Captured] = {}
        self._memory: tuple[int, torch.Size] | None = None
        self._room = Room()
        self._memory_pool: Any = None
        self.owner: object | None = None
        """Whose requests the decoding state is of."""

    def question(self, rows: int, requests: Sequence[Request]) -> _Captured:
        """The pass for a question of so many tokens, its attention planned."""
        return self._ready("question", _bucket(QUESTION_ROWS, rows), requests)

    def decoding(self, rows: int, requests: Sequence[Request]) -> _Captured:
        """The pass for the next token of so many requests, its attention planned."""
        return self._ready("decoding", _bucket(DECODE_ROWS, rows), requests)

    def _ready(self, kind: str, rows: int, requests: Sequence[Request]) -> _Captured:
        memory = (self._pool.kv.data_ptr(), self._pool.kv.shape)
        if self._memory != memory:  # the pool has grown
            self._captured.clear()
            self._memory = memory
        while True:
            if (kind, rows) not in self._captured:
                self._captured[kind, rows] = self._capture(kind, rows)
            captured = self._captured[kind, rows]
            wanted = captured.plan.load(requests)
            if wanted is None:
                return captured
            self._room = wanted  # more segments than ever before: all graphs get larger tables
            self._captured.clear()

    @torch.inference_mode()
    def _capture(self, kind: str, rows: int) -> _Captured:
        started = perf_counter()
        model, device, size = self._model, self._model.device, self._pool.page_size
        window = model.config.window
        state = torch.zeros(4, rows, dtype=torch.int64, device=device)
        state[3] = -1
        tails = torch.zeros(rows, self._pool.pages_for(window), dtype=torch.int64, device=device)
        wanted = torch.arange(rows if kind == "decoding" else 1, device=device)
        cos, sin = model.rotary.table(window)
        config = model.config
        plan = StaticPlan(
            rows=rows,
            positions=state[1],
            cos=cos,
            sin=sin,
            group=config.q_heads // config.kv_heads,
            kv_heads=config.kv_heads,
            page_size=size,
            room=self._room,
            shared=kind == "question" or rows == 1,
        )

        def run() -> tuple[Tensor, Tensor]:
            token_ids, _, frames, slots = state
            if kind == "decoding":
                page = tails.gather(1, (frames // size)[:, None])[:, 0]
                slots = torch.where(page < 0, page, page * size + frames % size)
            step = Step(cos[frames], sin[frames], (plan.plan,))
            logits = model.compute(token_ids, slots, step, self._pool.kv, wanted)
            if logits is None:
                raise RuntimeError("the model gave no logits although rows were asked for")
            ids, finite = greedy(logits, path="triton")
            chosen = torch.stack((ids, finite.to(torch.int64)))
            if kind == "decoding":
                state[0] = ids
                state[1:3] += 1
            return chosen, logits

        tails.fill_(-1)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()  # compiles, and makes what a graph must not own
            state[:3] = 0
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._memory_pool is None:
            self._memory_pool = torch.cuda.graph_pool_handle()
        # What other threads of the application do on the device must not end the capture.
        with torch.cuda.graph(graph, pool=self._memory_pool, stream=stream, capture_error_mode="thread_local"):
            chosen, logits = run()
        torch.cuda.current_stream(device).wait_stream(stream)
        if kind == "decoding":
            self.owner = None
        _log.debug("captured a %s pass of %d rows in %.0f ms", kind, rows, (perf_counter() - started) * 1e3)
        return _Captured(graph, state, tails, chosen, logits, wanted, plan)


class _Pending:
    """Results that are on their way to the host."""

    def __init__(self, rows: Sequence[Row], captured: _Captured) -> None:
        self.rows = list(rows)
        self._host = torch.empty(captured.chosen.shape, dtype=torch.int64, pin_memory=True)
        self._host.copy_(captured.chosen, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def wait(self) -> tuple[list[int], list[bool]]:
        """Ids, and whether their logits were finite."""
        self._there.synchronize()
        ids, finite = self._host.tolist()
        return ids, list(map(bool, finite))


class GraphDecoder:
    """`decoding.Decoder` over CUDA graphs. While the host looks at greedy tokens, the next ones are computed."""

    def __init__(self, graphs: Graphs, model: Model, pool: Pool) -> None:
        self._graphs, self._model, self._pool = graphs, model, pool
        self._rows: list[Row] = []
        self._pending: _Pending | None = None
        self._captured: _Captured | None = None

    @torch.inference_mode()
    def admit(self, row: Row, tail: Sequence[int]) -> None:
        count = len(tail)
        if count > QUESTION_ROWS[-1]:
            row.choose(compute_logits(self._model, self._pool, [row.run(tail)])[0])
        else:
            run = row.run(tail)
            captured = self._graphs.question(count, [_request(run, slice(0, count))])
            frames = torch.arange(run.start, run.start + count)
            slots = slots_of(run.pages, run.start, run.start + count, self._pool.page_size)
            size = captured.state.shape[1]
            state = torch.zeros(4, size, dtype=torch.int64, pin_memory=True)
            state[3] = -1
            state[:, :count] = torch.stack((torch.tensor(run.token_ids), frames + run.origin, frames, slots))
            captured.state.copy_(state, non_blocking=True)
            captured.wanted.fill_(count - 1)
            captured.graph.replay()
            if row.sampler.greedy:
                ids, finite = _Pending([row], captured).wait()
                row.take(ids[0], finite[0])
            else:
                row.choose(captured.logits[0])
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
        if pending is None or self._captured is None:
            raise RuntimeError("no request is running")
        logits = self._captured.logits
        ahead = self._graphs.owner is self and all(
            each.sampler.greedy and each.failure is None and each.done < each.reserved for each in self._rows
        )
        if ahead:
            self._launch()
        ids, finite = pending.wait()
        for index, each in enumerate(pending.rows):
            if each.sampler.greedy:
                each.take(ids[index], finite[index])
            else:
                each.choose(logits[index])
        if any(not each.sampler.greedy for each in pending.rows):
            self._write_last()

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
        self._pending = _Pending(self._rows, captured)

    def _load(self) -> None:
        """Put the requests into the graph's memory."""
        self._rows = [row for row in self._rows if row.failure is None]
        requests = [
            _request(row.run((row.last,)), slice(at, at + 1), row.reserved) for at, row in enumerate(self._rows)
        ]
        captured = self._captured = self._graphs.decoding(len(self._rows), requests)
        rows = len(captured.tails)
        state = torch.zeros(4, rows, dtype=torch.int64)
        for at, row in enumerate(self._rows):
            state[:3, at] = torch.tensor((row.last, row.origin + row.done, row.done))
        captured.state.copy_(state.pin_memory(), non_blocking=True)
        longest = max(len(row.pages) for row in self._rows)
        tails = torch.full((rows, longest), -1, dtype=torch.int64)
        for at, row in enumerate(self._rows):
            tails[at, : len(row.pages)] = row.pages
        captured.tails.fill_(-1)
        captured.tails[:, :longest] = tails.pin_memory().to(captured.tails.device, non_blocking=True)
        self._graphs.owner = self

    def _write_last(self) -> None:
        """Give the graph the ids that the host has drawn."""
        if self._graphs.owner is self and self._captured is not None:
            ids = torch.tensor([row.last for row in self._rows])
            self._captured.state[0, : len(ids)] = ids.pin_memory().to(self._captured.state.device, non_blocking=True)


def _request(run: Run, rows: slice, reserved: int | None = None) -> Request:
    """What rows see; of the tail as much as is reserved: the kernel looks at positions."""
    stop = reserved or run.start + len(run.token_ids)
    return Request(rows, (*run.context, PagedSegment(run.pages, 0, stop, run.origin)))


def _bucket(sizes: Sequence[int], rows: int) -> int:
    return next(size for size in sizes if size >= rows)
