"""Steps on CUDA graphs: questions and next tokens without a launch from the host per kernel.

A graph reads all that changes from tables and counters on the device, so one graph per number of rows serves every
context, and growing text needs no new one. Rows of the running batch lie in memory that all decoding graphs share, each
in its slot: a row joins or leaves by a write to its slot alone. Tokens are chosen on the device too: where all requests
are greedy, the likeliest alone; else by a graph of its own, which samples and counts repetitions for each request.

Everything runs on one stream, in the order of the calls: what the pages of an ended request are used for next comes
after its last write. A step is launched before the one before it was taken, so the device does not idle while the host
looks at tokens.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.engine.batch import Run, forward
from braidsdk.engine.runner import Chosen, Piece, Row
from braidsdk.engine.sampling import Sampler
from braidsdk.engine.scheduler import ROW_SLOTS
from braidsdk.errors import PoolFullError
from braidsdk.kernels.attention.launch import Room, StaticPlan, TritonPlan
from braidsdk.kernels.attention.live import LivePlan
from braidsdk.kernels.attention.live_tables import LiveRoom
from braidsdk.kernels.head import greedy
from braidsdk.kernels.measure import measuring
from braidsdk.kernels.paging import PagedSegment, Request, slots_of
from braidsdk.kernels.sample import Choices, sample
from braidsdk.models.base import Model, Step

_log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class _Question:
    """A graph of one request's tokens, or of several questions, and the memory that it reads and writes.

    Attributes:
        graph: one pass.
        state: absolute positions, positions in the tail's frame, token ids and slots; int64 [4, rows].
        wanted: the rows with logits, int64 [requests].
        chosen: the ids, and whether their logits are finite, int64 [2, requests].
        choices: how they are chosen; None takes the likeliest.
        plan: its attention.
    """

    graph: torch.cuda.CUDAGraph
    state: Tensor
    wanted: Tensor
    chosen: Tensor
    choices: Choices | None
    plan: StaticPlan


@dataclass(frozen=True)
class _Decoding:
    """A graph of the next token of the running batch.

    Attributes:
        graph: one pass.
        wanted: all of its rows, int64; the graph reads it, so it must live as long.
        plan: its attention, if it is of one row; else all of them read the batch's own.
    """

    graph: torch.cuda.CUDAGraph
    wanted: Tensor
    plan: StaticPlan | None


@dataclass(frozen=True)
class _Batch:
    """The running batch, in memory that all decoding graphs share.

    Attributes:
        state: of each slot's row the absolute position, the position in its tail's frame, and by how much both grow
            each step: 1, or 0 in an empty slot; int64 [3, slots].
        slots: where each token of a row's tail goes, -1 in an empty slot; int64 [slots, window].
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
        self._questions: dict[tuple[int, int, bool], _Question] = {}
        self._decodings: dict[tuple[int, bool], _Decoding] = {}
        self._room = Room()
        self._memory_pool: Any = None
        self._stream = torch.cuda.Stream(model.device)
        self._batch: _Batch | None = None

    @property
    def batch(self) -> _Batch:
        """The running batch; empty at first."""
        if self._batch is None:
            device, config = self._model.device, self._model.config
            seen = torch.zeros(ROW_SLOTS, config.vocab_size, dtype=torch.bool, device=device)
            self._batch = _Batch(
                state=torch.zeros(3, ROW_SLOTS, dtype=torch.int64, device=device),
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

    def question(self, requests: Sequence[Request], *, drawn: bool) -> _Question:
        """The pass for tokens of these requests, one after another, its attention planned."""
        many = len(requests) > 1
        size = _bucket(TOGETHER_ROWS if many else QUESTION_ROWS, requests[-1].rows.stop)
        while True:
            captured = self._question(size, TOGETHER if many else 1, drawn)
            if (room := captured.plan.load(requests)) is None:
                return captured
            self._grow(room)

    def decoding(self, rows: int, *, drawn: bool) -> _Decoding:
        """The pass for the next token of rows in slots below `rows`; `drawn`: some are not greedy."""
        return self._decoding(_bucket(DECODE_ROWS, rows), drawn)

    def plan_one(self, request: Request, *, drawn: bool) -> _Decoding:
        """The pass for the next token of one row, its attention planned."""
        while True:
            captured = self._decoding(1, drawn)
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
        for drawn in (False, True):
            for rows in QUESTION_ROWS:
                yield partial(self._question, rows, 1, drawn)
            for rows in TOGETHER_ROWS if requests > 1 else ():
                yield partial(self._question, rows, TOGETHER, drawn)
            for rows in DECODE_ROWS:
                if rows <= _bucket(DECODE_ROWS, requests):
                    yield partial(self._decoding, rows, drawn)
        yield torch.cuda.current_stream(self._model.device).synchronize

    def launches(self) -> dict[str, int]:
        """Kernels that a replay of each captured pass launches, by what it computes."""
        passes = [(f"{n} questions of {rows}" if n > 1 else f"question of {rows}", drawn, captured.graph)
                  for (rows, n, drawn), captured in sorted(self._questions.items())]  # fmt: skip
        passes += [
            (f"decoding of {rows}", drawn, captured.graph)
            for (rows, drawn), captured in sorted(self._decodings.items())
        ]
        return {f"{name}{', drawn' if drawn else ''}": _kernels(graph) for name, drawn, graph in passes}

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

    def _question(self, rows: int, requests: int, drawn: bool) -> _Question:
        if (rows, requests, drawn) not in self._questions:
            device, vocab = self._model.device, self._model.config.vocab_size
            state = torch.zeros(4, rows, dtype=torch.int64, device=device)
            state[3] = -1
            wanted = torch.zeros(requests, dtype=torch.int64, device=device)
            chosen = torch.zeros(2, requests, dtype=torch.int64, device=device)
            seen = torch.zeros(requests, vocab, dtype=torch.bool, device=device) if drawn else None
            choices = None if seen is None else Choices.greedy(seen)
            plan = self._plan(state[0], shared=requests == 1)

            def run() -> None:
                self._pass(state[2], state[1], state[3], wanted, plan.plan, choices, chosen)

            graph = self._record(run, f"question of {rows}")
            self._questions[rows, requests, drawn] = _Question(graph, state, wanted, chosen, choices, plan)
        return self._questions[rows, requests, drawn]

    def _decoding(self, rows: int, drawn: bool) -> _Decoding:
        if (rows, drawn) not in self._decodings:
            batch = self.batch
            mine = (batch.state, batch.chosen, batch.choices.draws, batch.choices.seen)
            kept = [part.clone() for part in mine]  # recording computes a token that nobody asked for
            wanted = torch.arange(rows, device=self._model.device)
            chosen, state, all_choices = batch.chosen[:, :rows], batch.state[:, :rows], batch.choices
            alone = self._plan(state[0], shared=True) if rows == 1 else None
            cos, sin = self._model.rotary.table(self._model.config.window)
            plan = alone.plan if alone else batch.attention.plan(state[0], cos, sin)

            def run() -> None:
                slots = batch.slots[:rows].gather(1, state[1][:, None])[:, 0]
                choices = None
                if drawn:
                    shape, draws = (part[:, :rows].contiguous() for part in (all_choices.shape, all_choices.draws))
                    choices = Choices(shape, draws, all_choices.seen[:rows])
                self._pass(chosen[0], state[1], slots, wanted, plan, choices, chosen)
                if choices:
                    all_choices.draws[:, :rows] = choices.draws
                state[:2].add_(state[2])

            batch.state[2] = 0
            batch.attention.blank()  # rows beyond this pass may be running, and it has no memory for their results
            graph = self._record(run, f"decoding of {rows}")
            for part, value in zip(mine, kept, strict=True):
                part.copy_(value)
            self._decodings[rows, drawn] = _Decoding(graph, wanted, alone)
        return self._decodings[rows, drawn]

    def _plan(self, positions: Tensor, *, shared: bool) -> StaticPlan:
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
            shared=shared,
        )

    def _pass(
        self,
        token_ids: Tensor,
        frames: Tensor,
        slots: Tensor,
        wanted: Tensor,
        plan: TritonPlan,
        choices: Choices | None,
        chosen: Tensor,
    ) -> None:
        """What a graph records of the model: a pass, and the choice of tokens into `chosen`."""
        cos, sin = self._model.rotary.table(self._model.config.window)
        step = Step(cos[frames], sin[frames], (plan,))
        logits = self._model.compute(token_ids, slots, step, self._pool.kv, wanted)
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


class _Pending:
    """A step's results, on their way to the host. The last copy's event is the last of all."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self._parts: list[tuple[Tensor, list[tuple[Row, int]]]] = []
        self._there: torch.cuda.Event | None = None

    def add(self, chosen: Tensor, rows: list[tuple[Row, int]]) -> None:
        """Results of rows, each in its column of `chosen`, int64 [2, columns]."""
        host = torch.empty(chosen.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(chosen, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()
        self._parts.append((host, rows))

    def take(self) -> list[Chosen]:
        if self._there:
            self._there.synchronize()
        found = []
        for host, rows in self._parts:
            ids, finite = host.tolist()
            found += [Chosen(row, ids[column], bool(finite[column])) for row, column in rows]
        return found


class GraphRunner:
    """`runner.Runner` over CUDA graphs. Texts, and questions longer than a graph takes, go through passes without."""

    ahead = True

    def __init__(self, model: Model, pool: Pool) -> None:
        self.graphs = Graphs(model, pool)
        self._model, self._pool = model, pool
        self._rows: dict[Row, None] = {}
        self._planned: _Decoding | None = None  # the pass of one row whose tables hold the one that is here

    def launch(self, pieces: Sequence[Piece], rows: Sequence[Row]) -> _Pending:
        pending = _Pending()
        if gone := [row for row in self._rows if row not in rows]:
            self._leave(gone)
        if rows:
            self._decode(pending)
        questions: list[Piece] = []
        plain: list[Piece] = []
        for piece in pieces:
            if piece.logits or len(piece.run.token_ids) > QUESTION_ROWS[-1]:
                plain.append(piece)
            elif piece.row:
                questions.append(piece)
            elif rows:  # beside rows that decode a text comes in small pieces, which launch faster in a graph
                self._compute([piece])
            else:
                plain.append(piece)
        if plain:
            self._prefill(plain, pending)
        for group in _groups(questions):
            self._begin(group, self._compute(group), pending)
        return pending

    def _decode(self, pending: _Pending) -> None:
        """The next token of every row."""
        batch = self.graphs.batch
        drawn = not all(row.sampler.greedy for row in self._rows)
        if batch.attention.rows > 1:
            captured = self.graphs.decoding(batch.attention.rows, drawn=drawn)
            batch.attention.upload()  # after a pass may have been recorded
        else:
            captured = self.graphs.decoding(1, drawn=drawn)
            if captured is not self._planned:
                (row,) = self._rows
                captured = self.graphs.plan_one(_request(row.run((0,)), slice(0, 1), row.reserved), drawn=drawn)
                self._planned = captured
        captured.graph.replay()
        for row in self._rows:
            row.done += 1
        pending.add(self.graphs.batch.chosen, [(row, row.slot) for row in self._rows])

    def _prefill(self, pieces: Sequence[Piece], pending: _Pending) -> None:
        """A pass without a graph."""
        wanted = [piece.row is not None or piece.logits for piece in pieces]
        logits = forward(self._model, self._pool, [piece.run for piece in pieces], wanted)
        enders = [piece for piece, ends in zip(pieces, wanted, strict=True) if ends]
        for at, piece in enumerate(enders):
            if logits is None:
                raise RuntimeError("the model gave no logits although rows were asked for")
            if piece.logits:
                pending.logits.append(logits[at])
            if piece.row:
                choices = None
                if not piece.row.sampler.greedy:
                    choices = Choices.greedy(torch.zeros_like(logits[at : at + 1], dtype=torch.bool))
                    set_choices(choices, 0, piece.row.sampler)
                chosen = torch.empty(2, 1, dtype=torch.int64, device=logits.device)
                choose_into(logits[at : at + 1], choices, chosen)
                self._begin([piece], chosen, pending)

    def _compute(self, pieces: Sequence[Piece]) -> Tensor:
        """Questions, or a piece of a text, by a graph: the ids chosen after each, as `_Question.chosen`."""
        requests, columns, ends, stop = [], [], [], 0
        for piece in pieces:
            run = piece.run
            start, stop = stop, stop + len(run.token_ids)
            frames = torch.arange(run.start, run.start + len(run.token_ids))
            slots = slots_of(run.pages, run.start, run.start + len(frames), self._pool.page_size)
            columns.append(torch.stack((frames + run.origin, frames, torch.tensor(run.token_ids), slots)))
            requests.append(_request(run, slice(start, stop)))
            ends.append(stop - 1)
        samplers = [piece.row.sampler for piece in pieces if piece.row]
        captured = self.graphs.question(requests, drawn=not all(sampler.greedy for sampler in samplers))
        if captured.choices:
            for at, sampler in enumerate(samplers):
                set_choices(captured.choices, at, sampler)
        state = torch.zeros_like(captured.state, device="cpu")
        state[3] = -1
        state[:, :stop] = torch.cat(columns, 1)
        captured.state.copy_(state.pin_memory(), non_blocking=True)
        if len(ends) == 1:
            captured.wanted.fill_(ends[0])
        else:
            captured.wanted[: len(ends)].copy_(torch.tensor(ends).pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.chosen

    def _begin(self, pieces: Sequence[Piece], chosen: Tensor, pending: _Pending) -> None:
        """The first token of each piece's row was chosen, in the columns of `chosen`: they go on from there."""
        rows = [piece.row for piece in pieces if piece.row]
        pending.add(chosen, [(row, at) for at, row in enumerate(rows)])
        for piece, row in zip(pieces, rows, strict=True):
            row.done = piece.run.start + len(piece.run.token_ids)
        joining = [(at, row) for at, row in enumerate(rows) if row.done < row.reserved - 1]
        if joining:
            self._join(joining, chosen[0])

    def _join(self, joining: Sequence[tuple[int, Row]], tokens: Tensor) -> None:
        """Put rows into their slots, where they decode from now on; each with the place of its first token in `tokens`.
        One copy to the device for all of them."""
        batch, longest = self.graphs.batch, max(row.reserved for _, row in joining)
        lines = torch.full((len(joining), 5 + longest), -1)
        heads = [(row.slot, at, row.origin + row.done, row.done, 1) for at, row in joining]
        lines[:, :5] = torch.tensor(heads)
        for line, (_, row) in zip(lines, joining, strict=True):
            line[5 : 5 + row.reserved] = slots_of(row.pages, 0, row.reserved, self._pool.page_size)
        lines = lines.pin_memory().to(self._model.device, non_blocking=True)
        slots = lines[:, 0]
        batch.state.index_copy_(1, slots, lines[:, 2:5].T)
        batch.slots[:, :longest].index_copy_(0, slots, lines[:, 5:])
        batch.chosen[0].index_copy_(0, slots, tokens[lines[:, 1]])
        for at, row in joining:
            if not row.sampler.greedy:
                set_choices(batch.choices, row.slot, row.sampler, ahead=1)
                batch.choices.seen[row.slot].scatter_(0, tokens[at : at + 1], True)
            self._rows[row] = None
            room = batch.attention.join(row.slot, _seen(row))
            while room:  # more than ever: all rows join a larger one
                self.graphs.enlarge_batch(room)
                batch = self.graphs.batch
                room = next(
                    (more for each in self._rows if (more := batch.attention.join(each.slot, _seen(each)))), None
                )
        self._planned = None

    def _leave(self, rows: Sequence[Row]) -> None:
        """Take rows out of their slots."""
        batch, longest = self.graphs.batch, max(row.reserved for row in rows)
        slots = torch.tensor([row.slot for row in rows]).pin_memory().to(self._model.device, non_blocking=True)
        batch.state.index_fill_(1, slots, 0)
        batch.slots[:, :longest].index_fill_(0, slots, -1)
        for row in rows:
            if not row.sampler.greedy:
                batch.choices.shape[:, row.slot] = torch.tensor((0.0, 1.0, 0.0, 1.0), dtype=torch.float64)
            batch.attention.leave(row.slot)
            del self._rows[row]
        self._planned = None


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
    table = 4 * (4 * (room.items + room.spans + room.frames) + 2 * room.rows + room.pages)
    graphs = 2 * (len(DECODE_ROWS) + len(QUESTION_ROWS) + len(TOGETHER_ROWS))
    kept = config.window * (config.head_dim * 4 + ROW_SLOTS * 8) + ROW_SLOTS * config.vocab_size + 4 * live.words
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


def choose_into(logits: Tensor, choices: Choices | None, out: Tensor) -> None:
    """Ids, and whether logits are finite, into `out`, int64 [2, rows]."""
    ids, finite = sample(logits, choices, path="triton") if choices else greedy(logits, path="triton")
    out[0] = ids
    out[1] = finite


def set_choices(choices: Choices, at: int, sampler: Sampler, *, ahead: int = 0) -> None:
    """Say how one row chooses its next token, `ahead` tokens after the last that its sampler was told of."""
    params, seed = sampler.params, sampler.seed
    shape = (params.temperature, params.top_p, params.min_p, params.repetition_penalty)
    draws = (params.top_k, seed - (seed >> 63 << 64), sampler.chosen + ahead)
    device = choices.shape.device
    choices.shape[:, at] = torch.tensor(shape, dtype=torch.float64).pin_memory().to(device, non_blocking=True)
    choices.draws[:, at] = torch.tensor(draws).pin_memory().to(device, non_blocking=True)
    if params.repetition_penalty != 1.0:
        choices.seen[at] = False
        choices.seen[at, sampler.said.pin_memory().to(device, non_blocking=True)] = True


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


def _seen(row: Row) -> tuple[PagedSegment, ...]:
    """All that a row may see, its tail as far as pages are reserved: the kernel looks at positions."""
    return (*row.context, PagedSegment(row.pages, 0, row.reserved, row.origin))


def _groups(questions: Sequence[Piece]) -> Iterator[list[Piece]]:
    """As many questions together as a graph takes."""
    group: list[Piece] = []
    tokens = 0
    for piece in questions:
        more = len(piece.run.token_ids)
        if group and (len(group) == TOGETHER or tokens + more > TOGETHER_ROWS[-1]):
            yield group
            group, tokens = [], 0
        group.append(piece)
        tokens += more
    if group:
        yield group


def _request(run: Run, rows: slice, reserved: int | None = None) -> Request:
    """What rows see; of the tail as much as is reserved: the kernel looks at positions."""
    stop = reserved or run.start + len(run.token_ids)
    return Request(rows, (*run.context, PagedSegment(run.pages, 0, stop, run.origin)))


def _bucket(sizes: Sequence[int], rows: int) -> int:
    return next(size for size in sizes if size >= rows)
