"""Captured passes of one model: questions and next tokens without a launch from the host per kernel.

A graph reads all that changes from tables and counters on the device, so one graph per number of rows serves every
context, and growing text needs no new one. Rows of the running batch lie in memory that all decoding graphs share, each
in its slot. Tokens are chosen on the device too: where all requests are greedy, the likeliest alone; else by a graph of
its own, which samples and counts repetitions for each request. Where some keys are hidden or shifted there is one more.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.engine.batch import Run, forward
from braidsdk.engine.scheduler import ROW_SLOTS
from braidsdk.errors import PoolFullError
from braidsdk.kernels.attention.launch import TritonPlan
from braidsdk.kernels.attention.live import LivePlan
from braidsdk.kernels.attention.live_tables import LiveRoom
from braidsdk.kernels.attention.static import Room, StaticPlan, changed
from braidsdk.kernels.head import greedy
from braidsdk.kernels.measure import measuring
from braidsdk.kernels.paging import Request
from braidsdk.kernels.sample import Choices, sample
from braidsdk.kernels.step import begin_step, end_step
from braidsdk.models.base import Model, Step

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Requests that a graph computes the next token of; the smallest that holds them is taken."""

QUESTION_ROWS = (16, 32, 64, 128, 512)
"""Tokens of one request, a question or a piece of a text, that a graph computes; longer ones take a pass without."""

TOGETHER_ROWS = (128, 512)
"""Tokens of several questions that one graph computes."""

TOGETHER = 16
"""Questions that one graph computes at most."""

PREFILL_ROWS = (32, 512)
"""Tokens of the texts that `warm_up` computes as if they were registered."""

_KERNEL_NODE = 0
"""CU_GRAPH_NODE_TYPE_KERNEL of the CUDA driver."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuestionPass:
    """A graph of one request's tokens, or of several questions, and the memory that it reads and writes.

    Attributes:
        graph: one pass.
        state: absolute positions, positions in the tail's frame, token ids, slots; and at the start of the last line
            the row of each request's last token, after which its logits are wanted; int64 [5, rows].
        chosen: the ids, and whether their logits are finite, int64 [2, requests].
        choices: how they are chosen; None takes the likeliest.
        plan: its attention.
    """

    graph: torch.cuda.CUDAGraph
    state: Tensor
    chosen: Tensor
    choices: Choices | None
    plan: StaticPlan


@dataclass(frozen=True)
class DecodingPass:
    """A graph of the next token of the running batch.

    Attributes:
        graph: one pass.
        plan: its attention, if it is of one row; else all of them read the batch's own.
    """

    graph: torch.cuda.CUDAGraph
    plan: StaticPlan | None


@dataclass(frozen=True)
class RunningBatch:
    """The running batch, in memory that all decoding graphs share.

    Attributes:
        state: of each slot's row the absolute position, and the position in its tail's frame, which is -1 in an empty
            slot; int64 [2, slots]. Both grow at the end of each step.
        slots: where each token of a row's tail goes; int64 [slots, window].
        chosen: the id to go on from, which the next one takes the place of, and whether its logits were finite; int64
            [2, slots].
        choices: how they are chosen.
        attention: what each row sees.
    """

    state: Tensor
    slots: Tensor
    chosen: Tensor
    choices: Choices
    attention: LivePlan


class Graphs:
    """The captured passes of one model and pool, made when first needed."""

    def __init__(self, model: Model, pool: Pool) -> None:
        self._model, self._pool = model, pool
        # By tokens, or rows; requests; whether some are not greedy; whether some see hidden or shifted keys.
        self._questions: dict[tuple[int, int, bool, bool], QuestionPass] = {}
        self._decodings: dict[tuple[int, bool, bool], DecodingPass] = {}
        self._room = Room()
        self._memory_pool: Any = None
        self._stream = torch.cuda.Stream(model.device)
        self._batch: RunningBatch | None = None

    @property
    def batch(self) -> RunningBatch:
        """The running batch; empty at first."""
        if self._batch is None:
            device, config = self._model.device, self._model.config
            seen = torch.zeros(ROW_SLOTS, config.vocab_size, dtype=torch.bool, device=device)
            self._batch = RunningBatch(
                state=torch.full((2, ROW_SLOTS), -1, dtype=torch.int64, device=device),
                slots=torch.full((ROW_SLOTS, config.window), -1, dtype=torch.int64, device=device),
                chosen=torch.zeros(2, ROW_SLOTS, dtype=torch.int64, device=device),
                choices=Choices.greedy(seen),
                attention=self._attention(LiveRoom()),
            )
        return self._batch

    def enlarge_batch(self, room: LiveRoom) -> None:
        """Let rows see more than ever before: they have to join the new batch's attention once more."""
        self._batch = replace(self.batch, attention=self._attention(room))
        self._decodings = {key: each for key, each in self._decodings.items() if each.plan}

    def _attention(self, room: LiveRoom) -> LivePlan:
        config = self._model.config
        return LivePlan(
            slots=ROW_SLOTS,
            group=config.q_heads // config.kv_heads,
            kv_heads=config.kv_heads,
            page_size=self._pool.page_size,
            device=self._model.device,
            room=room,
        )

    def question(self, requests: Sequence[Request], *, drawn: bool) -> QuestionPass:
        """The pass for tokens of these requests, one after another, its attention planned."""
        many = len(requests) > 1
        size = _bucket(TOGETHER_ROWS if many else QUESTION_ROWS, requests[-1].rows.stop)
        while True:
            captured = self._question(size, TOGETHER if many else 1, drawn, changed(requests))
            if (room := captured.plan.load(requests)) is None:
                return captured
            self._grow(room)

    def decoding(self, rows: int, *, drawn: bool, changes: bool) -> DecodingPass:
        """The pass for the next token of rows in slots below `rows`; `drawn`: some are not greedy; `changes`: some see
        keys that are hidden or shifted."""
        return self._decoding(_bucket(DECODE_ROWS, rows), drawn, changes)

    def plan_one(self, request: Request, *, drawn: bool) -> DecodingPass:
        """The pass for the next token of one row, its attention planned."""
        while True:
            captured = self._decoding(1, drawn, changed([request]))
            if captured.plan is None or (room := captured.plan.load([request])) is None:
                return captured
            self._grow(room)

    def warm_up(self, requests: int) -> Iterator[Callable[[], object]]:
        """Steps that compile what registering, questions, and so many requests at once need, and capture their passes.

        Args:
            requests: at most `ROW_SLOTS`.
        """
        for tokens in PREFILL_ROWS:
            yield partial(self._prefill, tokens)
        for drawn, changes in product((False, True), repeat=2):
            for rows in QUESTION_ROWS:
                yield partial(self._question, rows, 1, drawn, changes)
            for rows in TOGETHER_ROWS if requests > 1 else ():
                yield partial(self._question, rows, TOGETHER, drawn, changes)
            for rows in DECODE_ROWS:
                if rows <= _bucket(DECODE_ROWS, requests):
                    yield partial(self._decoding, rows, drawn, changes)
        yield torch.cuda.current_stream(self._model.device).synchronize

    def launches(self) -> dict[str, int]:
        """Kernels that a replay of each captured pass launches, by what it computes."""
        passes = [(f"{n} questions of {rows}" if n > 1 else f"question of {rows}", drawn, changes, captured.graph)
                  for (rows, n, drawn, changes), captured in sorted(self._questions.items())]  # fmt: skip
        passes += [
            (f"decoding of {rows}", drawn, changes, captured.graph)
            for (rows, drawn, changes), captured in sorted(self._decodings.items())
        ]
        return {
            name + ", drawn" * drawn + ", repaired" * changes: _kernels(graph) for name, drawn, changes, graph in passes
        }

    def _prefill(self, tokens: int) -> None:
        pages = self._pool.take(tokens)
        try:
            forward(self._model, self._pool, [Run((0,) * tokens, (), pages, 0, 0)])
        finally:
            self._pool.give_back(pages)

    def _grow(self, room: Room) -> None:
        """More segments than ever before: graphs of one request get larger tables."""
        self._room = room
        self._questions.clear()
        self._decodings = {key: each for key, each in self._decodings.items() if not each.plan}

    def _question(self, rows: int, requests: int, drawn: bool, changes: bool) -> QuestionPass:
        if (rows, requests, drawn, changes) not in self._questions:
            device, vocab = self._model.device, self._model.config.vocab_size
            state = torch.zeros(5, rows, dtype=torch.int64, device=device)
            state[3] = -1
            chosen = torch.zeros(2, requests, dtype=torch.int64, device=device)
            seen = torch.zeros(requests, vocab, dtype=torch.bool, device=device) if drawn else None
            choices = None if seen is None else Choices.greedy(seen)
            plan = self._plan(state[0], changes)

            def run() -> None:
                self._pass(state[2], state[1], state[3], state[4, :requests], plan.plan, choices, chosen)

            graph = self._record(run, f"question of {rows}")
            self._questions[rows, requests, drawn, changes] = QuestionPass(graph, state, chosen, choices, plan)
        return self._questions[rows, requests, drawn, changes]

    def _decoding(self, rows: int, drawn: bool, changes: bool) -> DecodingPass:
        if (rows, drawn, changes) not in self._decodings:
            batch = self.batch
            mine = (batch.state, batch.chosen, batch.choices.draws, batch.choices.seen)
            kept = [part.clone() for part in mine]  # recording computes a token that nobody asked for
            chosen, state, all_choices = batch.chosen[:, :rows], batch.state[:, :rows], batch.choices
            alone = self._plan(state[0], changes) if rows == 1 else None
            cos, sin = self._model.rotary.table(self._model.config.window)
            plan = alone.plan if alone else batch.attention.plan(state[0], cos, sin, changes=changes)

            def run() -> None:
                choices = None
                if drawn:
                    shape, draws = (part[:, :rows].contiguous() for part in (all_choices.shape, all_choices.draws))
                    choices = Choices(shape, draws, all_choices.seen[:rows])
                self._pass(chosen[0], state[1], batch.slots[:rows], slice(None), plan, choices, chosen)
                if choices:
                    all_choices.draws[:, :rows] = choices.draws
                end_step(state, backend="triton")

            batch.state[1] = -1
            batch.attention.blank()  # rows beyond this pass may be running, and it has no memory for their results
            try:
                graph = self._record(run, f"decoding of {rows}")
            finally:
                for part, value in zip(mine, kept, strict=True):
                    part.copy_(value)
            self._decodings[rows, drawn, changes] = DecodingPass(graph, alone)
        return self._decodings[rows, drawn, changes]

    def _plan(self, positions: Tensor, changes: bool) -> StaticPlan:
        config = self._model.config
        cos, sin = self._model.rotary.table(config.window)
        return StaticPlan(
            rows=len(positions),
            positions=positions,
            cos=cos,
            sin=sin,
            group=config.q_heads // config.kv_heads,
            kv_heads=config.kv_heads,
            page_size=self._pool.page_size,
            room=self._room,
            changes=changes,
        )

    def _pass(
        self,
        token_ids: Tensor,
        frames: Tensor,
        slots: Tensor,
        wanted: Tensor | slice,
        plan: TritonPlan,
        choices: Choices | None,
        chosen: Tensor,
    ) -> None:
        """What a graph records of the model: a pass, and the choice of tokens into `chosen`."""
        table = self._model.rotary.table(self._model.config.window)
        hidden, cos, sin, slots = begin_step(token_ids, frames, slots, self._model.embedding, *table, backend="triton")
        logits = self._model.compute(hidden, slots, Step(cos, sin, plan), self._pool.kv, wanted)
        if logits is None:
            raise RuntimeError("the model gave no logits although rows were asked for")
        choose_into(logits, choices, chosen)

    def _record(self, run: Callable[[], None], what: str) -> torch.cuda.CUDAGraph:
        started = perf_counter()
        if self._memory_pool is None:
            self._memory_pool = torch.cuda.graph_pool_handle()
        graph = _record(run, self._stream, self._memory_pool)
        _log.debug("captured a %s in %.0f ms", what, (perf_counter() - started) * 1e3)
        return graph


def _record(run: Callable[[], None], stream: torch.cuda.Stream, memory_pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches on the current stream; `stream` is for the recording alone."""
    run()  # compiles, and makes what a graph must not own; in order with what other models of the process run
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # its nodes can be counted
    # What other threads of the application do on the device must not end the capture.
    with torch.cuda.graph(graph, pool=memory_pool, stream=stream, capture_error_mode="thread_local"):
        run()
    graph.instantiate()
    return graph


GRAPH_BYTES = 2 * 2**20
"""Of the driver, for the nodes of one graph, and rounding of the allocator."""

LIBRARY_BYTES = 64 * 2**20
"""Of libraries' workspaces, and of the kernels' code."""


def workspace_bytes(model: Model) -> int:
    """What a model's graphs take at most: activations, tables, partial results of attention, slots, what was seen.

    Twice what the largest pass works in: graphs share one such memory, and a pass runs once before it is captured.
    """
    config, room, itemsize = model.config, Room(), model.dtype.itemsize
    live = LiveRoom()
    width = config.q_heads * config.head_dim
    per_token = 8 * config.hidden_size + 4 * config.intermediate_size + 6 * width
    work = QUESTION_ROWS[-1] * per_token * itemsize
    work += max(room.partials, ROW_SLOTS * live.partials) * (width + config.q_heads) * 4
    work += ROW_SLOTS * config.vocab_size * 5
    table = 4 * (6 * room.items + room.words + 4 * QUESTION_ROWS[-1])
    graphs = 4 * (len(DECODE_ROWS) + len(QUESTION_ROWS) + len(TOGETHER_ROWS))
    kept = config.window * (config.head_dim * 4 + ROW_SLOTS * 8) + ROW_SLOTS * config.vocab_size + 4 * live.words
    return 2 * work + graphs * (table + GRAPH_BYTES) + kept + LIBRARY_BYTES


def runs_on_graphs(model: Model) -> bool:
    """Whether all of a model's operations run on Triton's kernels, which graphs are captured of; measured one by one,
    they run without."""
    return model.device.type == "cuda" and model.backends.triton and not measuring()


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


def choose_into(logits: Tensor, choices: Choices | None, out: Tensor) -> None:
    """Ids, and whether logits are finite, into `out`, int64 [2, rows]."""
    if choices:
        sample(logits, choices, out=out, backend="triton")
    else:
        greedy(logits, out=out, backend="triton")


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


def _bucket(sizes: Sequence[int], rows: int) -> int:
    return next(size for size in sizes if size >= rows)
