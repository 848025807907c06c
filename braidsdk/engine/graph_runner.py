"""Steps on CUDA graphs.

A row that joins or leaves the running batch changes its own slot alone. Everything runs on one stream, in the order of
the calls: what the pages of an ended request are used for next comes after its last write. A step is launched before
the one before it was taken, so the device does not idle while the host looks at tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.engine import graphs
from braidsdk.engine.batch import Run, forward
from braidsdk.engine.graphs import DecodingPass, Graphs, choose_into
from braidsdk.engine.runner import Chosen, Piece, Row
from braidsdk.kernels.attention.live import LivePlan
from braidsdk.kernels.attention.tables import page_ids
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.sample import Choices
from braidsdk.models.base import Model


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
    """`runner.Runner` over CUDA graphs. Texts, repairs with shifts, and questions and repairs longer than a graph takes
    go through passes without."""

    ahead = True

    def __init__(self, model: Model, pool: Pool) -> None:
        self.graphs = Graphs(model, pool)
        self._model, self._pool = model, pool
        self._rows: dict[Row, None] = {}
        self._apart: dict[Row, None] = {}  # those that the batch's attention does not know yet
        self._sampling = 0  # how many of all rows are not greedy
        self._changed = False  # whether rows have joined or left since their places were last told to the device
        self._planned: DecodingPass | None = None  # the pass of one row whose tables hold the one that is here

    def launch(self, pieces: Sequence[Piece], rows: Sequence[Row]) -> _Pending:
        pending = _Pending()
        there = set(rows)
        if gone := [row for row in self._rows if row not in there]:
            self._leave(gone)
        if rows:
            self._decode(pending)
        questions: list[Piece] = []
        plain: list[Piece] = []
        for piece in pieces:
            long = len(piece.run.token_ids) > graphs.QUESTION_ROWS[-1]
            if piece.run.places is not None and not piece.run.shifts and not long:
                self._compute([piece])
            elif piece.logits or piece.run.places is not None or long:
                plain.append(piece)
            elif piece.row:
                questions.append(piece)
            elif rows and not plain:  # beside rows that decode a text comes in small pieces: a graph launches faster
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
        drawn = self._sampling > 0
        if self._changed:
            self._place_rows()
        first = next(iter(self._rows))
        if len(self._rows) == 1 and first.slot == 0:
            changes = any(segment.changed for segment in first.context)
            captured = self.graphs.decoding(1, drawn=drawn, changes=changes)
            if captured is not self._planned:
                captured = self.graphs.plan_one(_request(first.run((0,)), slice(0, 1), first.reserved), drawn=drawn)
                self._planned = captured
        else:
            attention = self._attention()
            captured = self.graphs.decoding(attention.rows, drawn=drawn, changes=attention.changes)
            attention.upload()  # after a pass may have been recorded
        captured.graph.replay()
        for row in self._rows:
            row.done += 1
        pending.add(self.graphs.batch.chosen, [(row, row.slot) for row in self._rows])

    def _prefill(self, pieces: Sequence[Piece], pending: _Pending) -> None:
        """A pass without a graph."""
        wanted = [piece.rows for piece in pieces]
        logits = forward(self._model, self._pool, [piece.run for piece in pieces], wanted)
        stop = 0
        for piece in pieces:
            if not piece.rows:
                continue
            if logits is None:
                raise RuntimeError("the model gave no logits although rows were asked for")
            start, stop = stop, stop + piece.rows
            if piece.logits:
                pending.logits.append(logits[start:stop])
            if piece.row:
                choices = None
                if not piece.row.sampler.greedy:
                    choices = Choices.greedy(torch.zeros_like(logits[stop - 1 : stop], dtype=torch.bool))
                    piece.row.sampler.describe(choices, 0)
                chosen = torch.empty(2, 1, dtype=torch.int64, device=logits.device)
                choose_into(logits[stop - 1 : stop], choices, chosen)
                self._begin([piece], chosen, pending)

    def _compute(self, pieces: Sequence[Piece]) -> Tensor:
        """Questions, or a piece of a text, by a graph: the ids chosen after each, as `QuestionPass.chosen`."""
        requests, stop = [], 0
        for piece in pieces:
            start, stop = stop, stop + len(piece.run.token_ids)
            requests.append(_request(piece.run, slice(start, stop)))
        samplers = [piece.row.sampler for piece in pieces if piece.row]
        captured = self.graphs.question(requests, drawn=not all(sampler.greedy for sampler in samplers))
        if captured.choices:
            for at, sampler in enumerate(samplers):
                sampler.describe(captured.choices, at)
        state = np.zeros(captured.state.shape, np.int64)
        state[3] = -1
        for at, (piece, request) in enumerate(zip(pieces, requests, strict=True)):
            run, rows = piece.run, request.rows
            frames = run.frame.numpy()
            state[0, rows] = frames + run.origin
            state[1, rows] = frames
            state[2, rows] = run.token_ids
            state[3, rows] = self._slots(run.pages, frames + run.offset)
            state[4, at] = rows.stop - 1
        captured.state.copy_(torch.from_numpy(state).pin_memory(), non_blocking=True)
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
        made = np.full((len(joining), 2 + longest), -1)
        for line, (at, row) in zip(made, joining, strict=True):
            line[:2] = row.slot, at
            line[2 : 2 + row.reserved] = self._slots(row.pages, np.arange(row.reserved))
        lines = torch.from_numpy(made).pin_memory().to(self._model.device, non_blocking=True)
        slots = lines[:, 0]
        batch.slots[:, :longest].index_copy_(0, slots, lines[:, 2:])
        batch.chosen[0].index_copy_(0, slots, tokens[lines[:, 1]])
        for at, row in joining:
            if not row.sampler.greedy:
                row.sampler.describe(batch.choices, row.slot, ahead=1)
                batch.choices.seen[row.slot].scatter_(0, tokens[at : at + 1], True)
            self._sampling += not row.sampler.greedy
            self._rows[row] = self._apart[row] = None
        self._planned, self._changed = None, True

    def _attention(self) -> LivePlan:
        """The running batch's attention, with all rows. Only a row beside others joins it."""
        attention = self.graphs.batch.attention
        while self._apart:
            row = next(iter(self._apart))
            if room := attention.join(row.slot, _seen(row)):  # more than ever: all rows join a larger one
                self.graphs.enlarge_batch(room)
                attention, self._apart = self.graphs.batch.attention, dict.fromkeys(self._rows)
            else:
                del self._apart[row]
        return attention

    def _slots(self, pages: Tensor, places: "np.ndarray[Any, np.dtype[np.int64]]") -> Any:
        """Slots of an entry's tokens, int64 [tokens]. For few tokens this is faster than `paging.slots_of`."""
        size = self._pool.page_size
        return np.frombuffer(page_ids(pages), np.int32)[places // size] * size + places % size

    def _leave(self, rows: Sequence[Row]) -> None:
        """Take rows out of their slots. What lies there stays: a row that does not grow writes nowhere. Only how it was
        sampled goes, so that the slot's next row is greedy unless it says otherwise."""
        attention, choices = self.graphs.batch.attention, self.graphs.batch.choices
        for row in rows:
            if not row.sampler.greedy:
                self._sampling -= 1
                choices.shape[:, row.slot] = torch.tensor((0.0, 1.0, 0.0, 1.0), dtype=torch.float64)
            if row in self._apart:
                del self._apart[row]
            else:
                attention.leave(row.slot)
            del self._rows[row]
        self._planned, self._changed = None, True

    def _place_rows(self) -> None:
        """Tell the device where each row is."""
        state = np.full(self.graphs.batch.state.shape, -1)
        for row in self._rows:
            state[:, row.slot] = row.origin + row.done, row.done
        self.graphs.batch.state.copy_(torch.from_numpy(state).pin_memory(), non_blocking=True)
        self._changed = False


def _seen(row: Row) -> tuple[PagedSegment, ...]:
    """All that a row may see, its tail as far as pages are reserved: the kernel looks at positions."""
    return (*row.context, PagedSegment(row.pages, 0, row.reserved, row.origin))


def _groups(questions: Sequence[Piece]) -> Iterator[list[Piece]]:
    """As many questions together as a graph takes."""
    group: list[Piece] = []
    tokens = 0
    for piece in questions:
        more = len(piece.run.token_ids)
        if group and (len(group) == graphs.TOGETHER or tokens + more > graphs.TOGETHER_ROWS[-1]):
            yield group
            group, tokens = [], 0
        group.append(piece)
        tokens += more
    if group:
        yield group


def _request(run: Run, rows: slice, reserved: int | None = None) -> Request:
    """What rows see; of the tail as much as is reserved: the kernel looks at positions."""
    last, context = run.last, run.context
    if run.places is not None:  # chosen tokens may end before the last segment
        context = tuple(each for each in context if each.first <= run.origin + last)
    return Request(rows, (*context, run.entry(reserved or last + 1)))
