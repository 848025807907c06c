"""The engine's thread: it owns model, pool and CUDA stream, and runs the loop that serves every request.

    while open:
        take what came by mail          # new requests, cancellations, control calls, what I/O threads found
        admit what fits                 # scheduler, residency
        launch a step                   # runner: a token for each row, and pieces of prefill
        wake the readers                # of many tokens; of few at once
        take the step before            # tokens to their readers; rows, slots and pages free
        look at a complete answer       # where it came from, if its caller asked

Nothing but this thread touches model and pool; I/O threads read and write the store, and only bytes of pages that were
taken for them.
"""

import atexit
import logging
import os
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import perf_counter

import torch
from torch import Tensor

from braidsdk.cache.pool import Pool
from braidsdk.cache.rates import Rates
from braidsdk.cache.residency import Residency
from braidsdk.cache.resident import Resident
from braidsdk.compose.repairs import overlay_key
from braidsdk.engine.attribution import Attribution
from braidsdk.engine.batch import Run
from braidsdk.engine.graph_runner import GraphRunner
from braidsdk.engine.graphs import runs_on_graphs
from braidsdk.engine.repair import Chosen, Repaired, apart, choose, put_back, repaired, settle
from braidsdk.engine.request import Outcome, Request
from braidsdk.engine.runner import EagerRunner, Piece, Results, Row, Runner
from braidsdk.engine.sampling import Sampler
from braidsdk.engine.scheduler import ROW_SLOTS, Scheduler, State, Work
from braidsdk.errors import BraidError, ClosedError, EngineError, NumericsError, QueueFullError, UnknownChunkError
from braidsdk.kernels.paging import PagedSegment
from braidsdk.models.base import Model
from braidsdk.settings import checks_itself
from braidsdk.store import ChunkStore, ModelIdentity, counters
from braidsdk.types import Timings

STEP_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens that one step prefills at most, by device; bounds the memory of activations."""

PIECE_TOKENS = {"cpu": 64, "cuda": 512}
"""The same while rows decode, so that they keep their pace. On one H200 pieces of 256 and 128 tokens changed
the gaps between tokens and the time of registering by a tenth at most; the CPU's is an estimate."""

JOINS = {"cpu": ROW_SLOTS, "cuda": 4}
"""Requests that join the running rows in one step at most, by device. Fewer shorten the longest gaps between tokens. On
one H200, 3 to 16 gave the same requests/s of 64 callers."""

FEW_READERS = 8
"""Up to so many readers are woken as soon as their tokens are there. More would compete with the engine for the
interpreter. They are woken once the next step is launched, and read while it is computed."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Part:
    """What one request prefills in a step: pieces, each with the entry that it completes."""

    request: Request
    pieces: Sequence[tuple[Piece, Resident | None]]

    @property
    def tokens(self) -> int:
        """How many: more than the scheduler chose if they must be in one pass."""
        return sum(len(piece.run.token_ids) for piece, _ in self.pieces)


@dataclass(eq=False)
class _Task:
    """What the loop keeps of a request from when it is ready.

    Attributes:
        runs: what its prefill has still to compute, each with the entry that it makes, None for the tail and what is
            repaired.
        row: its tail and answer, if it generates tokens.
        chooses: whether it has still to choose, once its entries are there, what of them it computes again.
        chosen: what it chose.
        repair: what it computes again, or takes from an earlier request.
        launched: tokens that were chosen or are on their way.
        answered: whether its answer is complete; it may still wait for a write.
        logits: those that `then` wants, as far as they are computed.
        computed, exact: places of the tokens that `Request.computed_tokens` and `exact_tokens` count.
    """

    runs: deque[tuple[Run, Resident | None]]
    row: Row | None = None
    chooses: bool = False
    chosen: Chosen | None = None
    repair: Repaired | None = None
    launched: int = 0
    answered: bool = False
    logits: list[Tensor] = field(default_factory=list)
    computed: list[range] = field(default_factory=list)
    exact: list[range] = field(default_factory=list)


@dataclass(frozen=True)
class _Mail:
    run: Callable[[], None]
    refuse: Callable[[BaseException], None] | None = None


class Loop:
    """The engine's thread and all that it owns. For other threads: `start`, `send`, `post`, `stop`, `join`."""

    def __init__(
        self,
        model: Model,
        pool: Pool,
        store: ChunkStore,
        identity: ModelIdentity,
        rates: Rates,
        max_queue: int,
    ) -> None:
        self.model, self.pool = model, pool
        self._store, self._identity, self._rates = store, identity, rates
        self.residency: Residency[Request] = Residency(model, pool, store, identity, rates, owner=self)
        self.scheduler: Scheduler[Request] = Scheduler(
            self.residency,
            max_queue=max_queue,
            step_tokens=STEP_TOKENS[model.device.type],
            piece_tokens=PIECE_TOKENS[model.device.type],
            joins=JOINS[model.device.type],
        )
        self.runner: Runner = GraphRunner(model, pool) if runs_on_graphs(model) else EagerRunner(model, pool)
        self.steps = self.step_tokens = self.last_step_rows = 0
        self.open = True
        self._checks = checks_itself()
        self._ended = False
        self._process = os.getpid()
        self._mail: SimpleQueue[_Mail] = SimpleQueue()
        self._tasks: dict[Request, _Task] = {}
        self._rows: dict[Row, Request] = {}
        self._flight: list[Results] | None = None
        self._attributions: dict[Request, Attribution] = {}
        self._rung: dict[Request, None] = {}
        self.thread = threading.Thread(target=self._main, name="braid-engine", daemon=True)

    # for other threads

    def start(self) -> None:
        """Begin; when the interpreter exits it is ended."""
        _loops.add(self)
        self.thread.start()

    def send(self, run: Callable[[], None], refuse: Callable[[BaseException], None]) -> None:
        """Run something in the engine's thread, or have it refused if the loop ends first."""
        self._mail.put(_Mail(run, refuse))
        if self._ended:  # it may have come after the last look into the mailbox
            self._refuse_mail()

    def post(self, work: Callable[[], None]) -> None:
        """Run something in the engine's thread, unless the loop ends first. Never blocks, and may interrupt itself."""
        self._mail.put(_Mail(work))

    def stop(self) -> None:
        """Let the loop end; in a fork, where there is none, do nothing. Never blocks: the garbage collector may call it
        in the loop's own thread, or in one that the loop waits for."""
        if os.getpid() == self._process:
            self.open = False
            self.post(lambda: None)

    def join(self) -> None:
        """Wait until the loop has ended; in a fork, and in its own thread, do nothing."""
        if os.getpid() == self._process and threading.current_thread() is not self.thread:
            self.thread.join()

    # the loop

    def _main(self) -> None:
        error: BaseException = closed()
        try:
            if self.model.device.type == "cuda":
                torch.cuda.set_device(self.model.device)
            with torch.inference_mode():
                busy = False
                while self.open:
                    if not busy and self._checks:
                        self._integrity()
                    self._receive(block=not busy)
                    busy = self.open and self._step()
                    if not busy:
                        self._wake_readers()
        except BaseException as failure:
            _log.exception("the engine failed")
            error = EngineError(
                f"The engine failed: {type(failure).__name__}: {str(failure)[:200]}. Open another Braid."
            )
            error.__cause__ = failure
        finally:
            self._end(error)

    def _receive(self, *, block: bool) -> None:
        """Take all mail; `block` for it, until the next deadline, if there is nothing else to do."""
        try:
            if block:
                deadline = self.scheduler.next_deadline()
                left = None if deadline is None else min(threading.TIMEOUT_MAX, max(0.0, deadline - perf_counter()))
                mail = self._mail.get(timeout=left)
            else:
                mail = self._mail.get_nowait()
            while True:
                mail.run()
                mail = self._mail.get_nowait()
        except Empty:
            pass

    def _step(self) -> bool:
        """Admit, launch, take; whether there was anything to do."""
        now = perf_counter()
        for request, error in self.scheduler.expired(now):
            self._fail(request, error)
        admitted = self._admit(now)
        rows = [
            request
            for request in self._rows.values()
            if request.params and self._tasks[request].launched < request.params.max_new_tokens
        ]
        work = self.scheduler.next(now, tuple(rows))
        flight = self._launch(work) if work else None
        if flight and not self.runner.ahead:
            self._take(flight)
            flight = None
        before, self._flight = self._flight, flight
        if len(self._rung) > FEW_READERS:
            self._wake_readers()
        if before:
            self._take(before)
        attributed = self._attribute()
        if len(self._rung) <= FEW_READERS:
            self._wake_readers()
        return bool(admitted or work or before or attributed)

    def _admit(self, now: float) -> bool:
        """Admit what fits; whether anything did."""
        admitted = self.scheduler.admit(now)
        for request in admitted:
            request.clock.admitted = now
            self.residency.start(request)
        return bool(admitted)

    def _launch(self, work: Work[Request]) -> list[Results]:
        """Start what the scheduler chose. What can't be computed fails, alone where the runner allows that."""
        parts = [_Part(request, self._cut(request, tokens)) for request, tokens in work.pieces]
        rows = [(request, row) for request in work.rows if (row := self._tasks[request].row)]
        done: list[tuple[Sequence[_Part], Results]] = []
        try:
            done.append((parts, self._compute(parts, [row for _, row in rows])))
        except Exception as error:
            if self.runner.ahead:  # a step on graphs may have moved rows on: not to be repeated
                for request in (*(part.request for part in parts), *work.rows):
                    self._fail(request, error)
            else:
                for part in parts:
                    self._try(part.request, [part], (), done)
                for request, row in rows:
                    self._try(request, (), [row], done)
        self.steps += 1
        self.step_tokens += len(work.rows) + sum(part.tokens for part in parts)
        self.last_step_rows = len(work.rows)
        for request in work.rows:
            if request in self._tasks:
                self._tasks[request].launched += 1
        for some, results in done:
            logits = iter(results.logits)
            for part in some:
                self._advance(part, logits)
        return [results for _, results in done]

    def _try(
        self,
        request: Request,
        parts: "Sequence[_Part]",
        rows: Sequence[Row],
        done: "list[tuple[Sequence[_Part], Results]]",
    ) -> None:
        """Compute what one request takes of a step that failed as a whole; what fails again is its own."""
        try:
            done.append((parts, self._compute(parts, rows)))
        except Exception as error:
            self._fail(request, error)

    def _compute(self, parts: "Sequence[_Part]", rows: Sequence[Row]) -> Results:
        return self.runner.launch([piece for part in parts for piece, _ in part.pieces], rows)

    def _cut(self, request: Request, tokens: int) -> "list[tuple[Piece, Resident | None]]":
        """The next tokens of a request's prefill, each piece with the entry that it completes."""
        task, pieces = self._tasks[request], []
        while tokens > 0:
            run, entry = task.runs.popleft()
            piece, rest = run.cut(tokens)
            tokens -= len(piece.token_ids)
            if rest:
                task.runs.appendleft((rest, entry))
            of_tail, later, logits = entry is None and piece.places is None, len(rest.token_ids) if rest else 0, 0
            if of_tail and request.then is not None:
                logits = min(len(piece.token_ids), max(0, 1 + len(request.forced) - later))
            row = task.row if of_tail and not rest else None
            pieces.append((Piece(piece, row, logits), None if rest else entry))
        return pieces

    def _advance(self, part: "_Part", logits: Iterator[Tensor]) -> None:
        """A part of a step was launched: what comes after it may count on it."""
        request = part.request
        for piece, entry in part.pieces:
            if piece.logits:
                given = next(logits)
                if task := self._tasks.get(request):
                    task.logits.append(given)
            if entry and request in self._tasks:
                self.residency.computed(entry)
                request.clock.entries = perf_counter()
        if request in self._tasks and self.scheduler.prefilled(request, part.tokens):
            if self._tasks[request].chooses:
                self._repair(request)
            else:
                self._prefilled(request)

    def _repair(self, request: Request) -> None:
        """All entries of a ready request are there, or will be before anything that is launched from now on: choose
        what of them is computed again. Choosing takes a pass at once. If it is kept, it may be there already."""
        task, held, composition = self._tasks[request], self.residency[request], request.composition
        task.chooses = False
        step_tokens = STEP_TOKENS[self.model.device.type]
        try:
            task.chosen = choose(
                self.model, self.pool, composition, self._context(request), held.pages, held.scratch, step_tokens
            )
        except Exception as error:
            self._fail(request, error)
            return
        if task.chosen.positions and composition.keeps_overlay:
            self.residency.keep_overlay(request, overlay_key(composition, request.keys, task.chosen.positions))
        else:
            self._lay_chosen(request, task.chosen)

    def _lay_chosen(self, request: Request, chosen: Chosen) -> None:
        """Lay out what a request computes again, or takes from where it was kept, and its tail."""
        task, held, composition = self._tasks[request], self.residency[request], request.composition
        context = self._context(request)
        if chosen.positions:
            there = held.kept and not self.residency.to_compute(request)
            try:
                repair = task.repair = repaired(
                    self.pool, composition, context, chosen.positions, held.scratch, held.overlay_pages
                )
                if there:
                    put_back(self.pool, repair)
                else:
                    self.pool.clear(repair.overlay)
            except Exception as error:
                self._fail(request, error)
                return
            if held.kept and request.counted:
                self.residency.count(request)
            if not there:
                task.runs.append((repair.run, None))
                request.repaired_tokens = len(chosen.positions)
                request.twice_tokens = _within(task.computed, chosen.positions)
                request.exact_tokens -= _within(task.exact, chosen.positions)
            context = (*repair.context, repair.scratch)
            chunks = sum(len(segment.token_ids) for segment in composition.segments[1:] if not segment.is_turn)
            request.budget = (request.repaired_tokens + chosen.work / self.model.config.layers) / chunks
        if composition.tail:
            self._lay_tail(request, task, context)
        self.scheduler.more(request, sum(len(run.token_ids) for run, _ in task.runs))
        if not task.runs:
            self._prefilled(request)

    def _context(self, request: Request) -> tuple[PagedSegment, ...]:
        """A request's entries at their places."""
        segments, entries = request.composition.segments, self.residency[request].entries
        return tuple(entry.at(segment.origin) for segment, entry in zip(segments, entries, strict=True))

    def _lay_tail(self, request: Request, task: _Task, context: tuple[PagedSegment, ...]) -> None:
        """Lay out a request's tail, which sees these segments, and its row."""
        composition, pages = request.composition, self.residency[request].pages
        origin = composition.tail_origin
        task.runs.append((Run((*composition.tail, *request.forced), context, pages, 0, origin), None))
        if request.params and request.slot is not None:
            said = composition.input_ids if request.params.repetition_penalty != 1.0 else ()
            sampler = Sampler(request.params, said)
            task.row = Row(request.slot, sampler, context, pages, origin, request.reserved)

    def _prefilled(self, request: Request) -> None:
        """All that a request needs computed is there, or will be before anything that is launched from now on."""
        task, clock, kept = self._tasks[request], request.clock, self.residency[request].kept
        clock.computed = perf_counter()
        self.scheduler.running(request)
        if request.repaired_tokens and task.repair and (task.row or kept):
            settle(self.pool, task.repair)
            if kept:
                self.residency.computed(kept)
        if task.repair and task.row:
            task.row.context = task.repair.settled
        self.residency.leave_scratch(request)
        if request.computed_tokens:
            _log.info("computed %d tokens of missing entries in %.1f ms", request.computed_tokens, clock.compute_ms)
        writes = self.residency.write(request, request.computed_tokens, clock.ready)
        if request.computed_tokens and not writes and self.model.device.type == "cpu" and not self._rows:
            self._rates.add("compute", request.computed_tokens, clock.computed - clock.ready)
        if task.row:
            task.launched = 1
            self._rows[task.row] = request
            return
        if request.then:
            try:
                logits = torch.cat(task.logits) if task.logits else None
                request.value = request.then(self.residency[request].entries, logits)
            except Exception as error:
                self._fail(request, error)
                return
        task.answered = True
        self._finish(request)

    def _take(self, flight: list[Results]) -> None:
        """Give the tokens of a step to their readers."""
        for chosen in (chosen for results in flight for chosen in results.take()):
            request = self._rows.get(chosen.row)
            if request is None or request.params is None:
                continue  # it has ended while this was on its way
            try:
                chosen.row.sampler.take(chosen.token, chosen.finite)
            except NumericsError as error:
                self._fail(request, error)
                continue
            now, tokens, text = perf_counter(), request.tokens, request.text
            request.clock.last_token = now
            if not tokens:
                request.clock.first_token = now
            tokens.append(chosen.token)
            if text:
                text.feed(chosen.token)
            if (
                len(tokens) == request.params.max_new_tokens
                or chosen.token in request.params.stop_ids
                or (text and text.stopped)
            ):
                self._answered(request, chosen.row)
            elif request.streamed:
                self._ring(request)

    def _ring(self, request: Request) -> None:
        """Wake a request's reader soon."""
        self._rung[request] = None

    def _wake_readers(self) -> None:
        rung, self._rung = self._rung, {}
        for call in dict.fromkeys(call for request in rung if (call := request.ring())):
            call()

    def _answered(self, request: Request, row: Row) -> None:
        """An answer is complete: end its request, after a look at what it attended to if that is wanted."""
        del self._rows[row]
        if request.sources:
            composition, repair = request.composition, self._tasks[request].repair
            context, owners = apart(repair, composition, row.context) if repair else (row.context, ())
            seen = (composition.tail[-1], *request.tokens[:-1])
            run = Run(seen, context, row.pages, len(composition.tail) - 1, row.origin)
            self._attributions[request] = Attribution(self.model, self.pool, run, owners)
        else:
            self._keep(request)

    def _attribute(self) -> bool:
        """Compute a piece of the attention of a complete answer; whether there was one."""
        for request, attribution in self._attributions.items():
            try:
                shares = attribution.advance()
            except Exception as error:
                self._fail(request, error)
                return True
            if shares is not None:
                del self._attributions[request]
                self._keep(request, shares)
            return True
        return False

    def _keep(self, request: Request, shares: Sequence[Sequence[float]] | None = None) -> None:
        """Keep a complete answer as a turn, and end its request unless it waits for a write."""
        tokens, stopped = request.tokens, request.text and request.text.stopped
        kept = len(tokens) - 1  # the last one's keys and values were not needed
        if request.text and stopped:
            kept = min(kept, len(request.text.ids()))
        ended = bool(stopped) or bool(request.params and tokens[-1] in request.params.stop_ids)
        request.outcome = Outcome(request.usage, _timings(request), "stop" if ended else "length", shares)
        if not self._tasks[request].repair:  # else it has seen more than what a turn's key says
            turn = request.composition.with_turn((*request.composition.tail, *tokens[:kept]))
            self.residency.adopt_turn(request, turn.keys(self._identity, request.namespace, request.keys)[-1])
        self._tasks[request].answered = True
        self._finish(request)

    def _finish(self, request: Request) -> None:
        """End a request that is answered and waits for no write."""
        if self._tasks[request].answered and not self.residency[request].writes:
            self._end_request(request, State.FINISHED)

    def _fail(self, request: Request, error: BaseException) -> None:
        if not request.ended:
            request.fail(error)  # before its state says that it is there
            self._end_request(request, State.FAILED)

    def _end_request(self, request: Request, state: State) -> None:
        task = self._tasks.pop(request, None)
        self._attributions.pop(request, None)
        if task and task.row:
            self._rows.pop(task.row, None)
        try:
            self.scheduler.end(request, state)
        finally:
            self._ring(request)

    # what mail asks for

    def submit(self, request: Request) -> None:
        if self.scheduler.full:
            self._admit(perf_counter())  # what came in the same step may not have to wait
        try:
            self.scheduler.submit(request)
        except QueueFullError as error:
            self.refuse(request, error)

    def refuse(self, request: Request, error: BaseException) -> None:
        """End a request that was never taken in."""
        request.fail(error)
        request.state = State.FAILED
        if call := request.ring():
            call()

    def cancel(self, request: Request) -> None:
        if request.number < 0:  # it was refused before it came here
            request.state = State.CANCELLED
        elif not request.ended:
            request.error = BraidError("The request was cancelled.")
            self._end_request(request, State.CANCELLED)

    def forget(self, chunk_ids: Set[str]) -> None:
        """Drop the entries of deleted chunks, and fail the requests that wait with one."""
        self.pool.drop_chunks(chunk_ids)
        for request in [request for request in self.scheduler if request.state is State.WAITING]:
            gone = [s.label for s in request.composition.segments if s.chunk_id in chunk_ids]
            if gone:
                self._fail(request, deleted(gone))

    # the residency's Owner

    def on_ready(self, request: Request) -> None:
        """Lay out a request's prefill; after that, what is kept of what it chose to compute again."""
        if (known := self._tasks.get(request)) and known.chosen:
            self._lay_chosen(request, known.chosen)
            return
        held, segments = self.residency[request], request.composition.segments
        missing = set(self.residency.to_compute(request))
        if request.counted:
            self.residency.count(request)
        runs: deque[tuple[Run, Resident | None]] = deque()
        computed: list[range] = []
        exact: list[range] = []
        for place, (segment, entry) in enumerate(zip(segments, held.entries, strict=True)):
            tokens = range(segment.origin, segment.origin + entry.tokens)
            if entry not in missing:
                if place < request.composition.exact_segments:
                    exact.append(tokens)
                continue
            missing.remove(entry)
            computed.append(tokens)
            request.stored_tokens += entry.tokens if segment.keep else 0
            context, origin = [], 0
            for index in segment.after:
                context.append(held.entries[index].at(origin))
                origin += held.entries[index].tokens
            self.pool.clear_entry(entry)
            run = Run(entry.key.token_ids, tuple(context), entry.pages, 0, origin, offset=entry.offset)
            runs.append((run, entry))
        request.computed_tokens, request.exact_tokens = sum(map(len, computed)), sum(map(len, exact))
        request.clock.ready = perf_counter()
        task = self._tasks[request] = _Task(runs, chooses=bool(request.overlay), computed=computed, exact=exact)
        if request.composition.tail and not task.chooses:
            self._lay_tail(request, task, self._context(request))
        self.scheduler.ready(request, sum(len(run.token_ids) for run, _ in runs))
        if not runs and task.chooses:
            self._repair(request)
        elif not runs:
            self._prefilled(request)

    def on_written(self, request: Request) -> None:
        self._finish(request)

    def on_failed(self, request: Request, error: BaseException) -> None:
        self._fail(request, error)

    # the end

    def _end(self, error: BaseException) -> None:
        """End every request, wait for I/O that runs, and free all."""
        self.open = False
        for request in list(self.scheduler):
            try:
                self._fail(request, error)
            except Exception:  # after a failure nothing is certain; nobody waits for ever all the same
                self.refuse(request, error)
        self._wake_readers()  # what follows may wait long for a disk
        self.residency.close()
        self._flight = None
        self.pool.close()
        del self.model, self.pool, self.runner
        self._remember()
        self._store.close()
        self._wake_readers()
        self._ended = True
        self._refuse_mail(error)

    def _refuse_mail(self, error: BaseException | None = None) -> None:
        while True:
            try:
                mail = self._mail.get_nowait()
            except Empty:
                return
            if mail.refuse:
                mail.refuse(error or closed())

    def _remember(self) -> None:
        """Leave counts and rates for later processes; what can't be written is only missed by statistics."""
        hits, misses = self.residency.hits, self.residency.misses
        counted: dict[str, int] = {}
        for namespace in hits.keys() | misses.keys():
            counted |= zip(counters(namespace), (hits[namespace], misses[namespace]), strict=True)
        try:
            self._store.remember(self._rates.changed(), add={name: count for name, count in counted.items() if count})
        except BraidError as error:
            _log.warning("counts and rates were not kept: %s", type(error).__name__)

    def _integrity(self) -> None:
        """Check that nothing is lost, when nothing runs."""
        self.scheduler.integrity()
        self.residency.integrity()
        if self._rows.keys() != {
            task.row for task in self._tasks.values() if task.row and task.launched and not task.answered
        }:
            raise RuntimeError("engine: a row is lost")


_loops: "weakref.WeakSet[Loop]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """End what is still open when the interpreter exits: threads that compute must not outlive it."""
    for loop in list(_loops):
        loop.stop()
        loop.join()


def deleted(labels: Sequence[str]) -> UnknownChunkError:
    names = ", ".join(map(repr, labels))
    return UnknownChunkError(f"Deleted meanwhile: {names}. Register it again, or compose without it.")


def closed() -> ClosedError:
    return ClosedError("This Braid is closed. Open a new one; what it stored is still there.")


def _within(places: Sequence[range], positions: Sequence[int]) -> int:
    """How many of the ascending positions are in one of the places."""
    return sum(bisect_left(positions, each.stop) - bisect_left(positions, each.start) for each in places)


def _timings(request: Request) -> Timings:
    clock, more = request.clock, len(request.tokens) - 1
    decoding = clock.last_token - clock.first_token
    return Timings(
        load_ms=(clock.ready - clock.admitted) * 1e3,
        prefill_ms=(clock.first_token - clock.ready) * 1e3,
        first_token_ms=(clock.first_token - request.submitted) * 1e3,
        decode_tokens_per_s=more / decoding if more and decoding else None,
        compute_ms=clock.compute_ms,
        queue_ms=(clock.admitted - request.submitted) * 1e3,
    )
