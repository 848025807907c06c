"""Decides which request is admitted, and what the next step computes.

These are the states of a request and all transitions:

    from     to         when
    -        waiting    it is submitted
    waiting  loading    it is admitted: it has its pages, its pins and its row slot
    loading  ready      every entry that it needs is there, or it computes the entry itself
    ready    running    its prefill is done; its row decodes, or what it computed is being written
    running  finished   its answer is complete, and what it computed is written
    any of these  failed     there was an error, its deadline passed, or the engine ended
    any of these  cancelled  its reader does not want it any more

A request that needs no row and writes nothing passes through `running` at once. A request gives back what it holds when
it ends, and nowhere else.

Requests are ordered by priority, then by arrival. A waiting request rises by one priority every `AGEING_S` seconds, so
that none waits forever. The first request in the order is admitted first: a smaller one does not overtake it.

Knows no torch and no thread, and nothing about what a request computes.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from itertools import count
from typing import Generic, Protocol, TypeVar

from braidsdk.errors import DeadlineError, QueueFullError

ROW_SLOTS = 64
"""How many requests decode at the same time."""

REGISTRATIONS = 3
"""How many registrations are admitted at the same time: one is computed while others are loaded and written."""

AGEING_S = 5.0
"""A request rises by one priority each time it has waited this long."""


class Priority(IntEnum):
    """What goes first: a smaller number goes before a larger one."""

    QUESTION = 0
    REPAIR = 1
    REGISTRATION = 2


class State(StrEnum):
    """The state of a request; see the module."""

    WAITING = "waiting"
    LOADING = "loading"
    READY = "ready"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})

TRANSITIONS: dict[State, set[State]] = {
    State.WAITING: {State.LOADING, State.FAILED, State.CANCELLED},
    State.LOADING: {State.READY, State.FAILED, State.CANCELLED},
    State.READY: {State.RUNNING, State.FAILED, State.CANCELLED},
    State.RUNNING: {State.FINISHED, State.FAILED, State.CANCELLED},
    State.FINISHED: set(),
    State.FAILED: set(),
    State.CANCELLED: set(),
}


@dataclass(eq=False, kw_only=True)
class Job:
    """What the scheduler knows about a request.

    Attributes:
        priority: its place in the order.
        submitted: when it was submitted, in seconds of the engine's clock.
        deadline: when it fails, in seconds of the engine's clock; None means never.
        decodes: whether it generates tokens, in a row slot.
        state: see the module.
        slot: its row slot, while it has one.
        to_prefill: tokens that its prefill still has to compute; set when it becomes ready.
        number: its place in the order of arrival.
    """

    priority: Priority
    submitted: float
    deadline: float | None = None
    decodes: bool = True
    state: State = field(default=State.WAITING, init=False)
    slot: int | None = field(default=None, init=False)
    to_prefill: int = field(default=0, init=False)
    number: int = field(default=-1, init=False)


J = TypeVar("J", bound=Job)
J_contra = TypeVar("J_contra", bound=Job, contravariant=True)


class Memory(Protocol[J_contra]):
    """Gives pages and pins to requests."""

    def admit(self, request: J_contra, /) -> bool:
        """Take all pages and pins that a request needs, or none. Returns whether it fits now."""
        ...

    def release(self, request: J_contra, /) -> None:
        """Give back everything that `admit` took."""
        ...


@dataclass(frozen=True)
class Work(Generic[J]):
    """One step.

    Attributes:
        pieces: requests that prefill, and how many tokens each.
        rows: requests that decode a token each.
    """

    pieces: tuple[tuple[J, int], ...]
    rows: tuple[J, ...]

    def __bool__(self) -> bool:
        return bool(self.pieces or self.rows)


class Scheduler(Generic[J]):
    """The requests of one engine that have not ended."""

    def __init__(
        self,
        memory: Memory[J],
        *,
        max_queue: int,
        step_tokens: int,
        piece_tokens: int,
        joins: int = ROW_SLOTS,
        slots: int = ROW_SLOTS,
    ) -> None:
        """Start without requests.

        Args:
            memory: gives pages and pins to requests.
            max_queue: how many requests may wait.
            step_tokens: the most tokens that one step prefills.
            piece_tokens: the same while rows decode, so that they keep their pace.
            joins: while rows decode, at most so many requests end their prefill in one step and decode from the next
                on.
            slots: number of row slots.
        """
        self._memory = memory
        self._max_queue = max_queue
        self._step_tokens, self._piece_tokens = step_tokens, piece_tokens
        self._joins, self._slots = joins, slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._numbers = count()
        self._queues: dict[Priority, deque[J]] = {priority: deque() for priority in Priority}
        self._admitted: dict[J, None] = {}  # loading, ready and running, in the order of admission
        self._timed: dict[J, None] = {}  # those with a deadline, in the order of arrival

    @property
    def waiting(self) -> int:
        """Requests that wait for admission."""
        return sum(map(len, self._queues.values()))

    @property
    def full(self) -> bool:
        """Whether `max_queue` requests wait."""
        return self.waiting >= self._max_queue

    @property
    def admitted(self) -> int:
        """Requests that are loading, ready or running."""
        return len(self._admitted)

    def __iter__(self) -> Iterator[J]:
        """All requests that have not ended."""
        yield from [*self._admitted, *(job for queue in self._queues.values() for job in queue)]

    def submit(self, job: J) -> None:
        """Put a request into the queue.

        Raises:
            QueueFullError: `max_queue` requests wait already.
        """
        if self.full:
            raise QueueFullError(
                f"The queue must hold fewer than {self._max_queue:,} waiting requests; got {self.waiting:,}, so it is "
                "full. Ask again later, or open the Braid with a larger max_queue."
            )
        job.number = next(self._numbers)
        self._queues[job.priority].append(job)
        if job.deadline is not None:
            self._timed[job] = None

    def admit(self, now: float) -> list[J]:
        """Admit requests in their order, as many as fit. Their state is then "loading"."""
        admitted = []
        while (job := self._first(now)) and self._memory.admit(job):
            self._queues[job.priority].popleft()
            self._move(job, State.LOADING)
            self._admitted[job] = None
            if job.decodes:
                job.slot = self._take_slot()
            admitted.append(job)
        return admitted

    def ready(self, job: J, to_prefill: int) -> None:
        """A request's entries are there; it has `to_prefill` tokens left to compute."""
        self._move(job, State.READY)
        job.to_prefill = to_prefill

    def more(self, job: J, to_prefill: int) -> None:
        """A ready request has `to_prefill` tokens left to compute after all."""
        job.to_prefill = to_prefill

    def running(self, job: J) -> None:
        """A request's prefill is done."""
        self._move(job, State.RUNNING)

    def end(self, job: J, state: State) -> bool:
        """End a request. Returns False if it had ended before."""
        if job.state in ENDED:
            return False
        self._check(job, state)
        self._timed.pop(job, None)
        try:
            if job.state is State.WAITING:
                self._queues[job.priority].remove(job)
            else:
                self._give_back(job)
        finally:
            job.state = state  # last, so that whoever sees it finds everything given back
        return True

    def next(self, now: float, decoding: tuple[J, ...]) -> Work[J]:
        """What the next step computes.

        Args:
            now: the engine's clock, in seconds.
            decoding: running requests that want a token.
        """
        budget, joins = (self._piece_tokens, self._joins) if decoding else (self._step_tokens, self._slots)
        pieces = []
        ready = [job for job in self._admitted if job.state is State.READY and job.to_prefill]
        for job in sorted(ready, key=lambda job: self._rank(job, now)):
            if not budget:
                break
            tokens = min(job.to_prefill, budget)
            if job.decodes and tokens == job.to_prefill:
                if not joins:
                    continue
                joins -= 1
            budget -= tokens
            pieces.append((job, tokens))
        return Work(tuple(pieces), decoding)

    def prefilled(self, job: J, tokens: int) -> bool:
        """A step computed `tokens` tokens of a request's prefill. Returns whether the prefill is complete."""
        job.to_prefill -= tokens
        return not job.to_prefill

    def expired(self, now: float) -> list[tuple[J, DeadlineError]]:
        """Requests that are past their deadline, each with an error for its reader."""
        return [
            (job, DeadlineError(f"The answer must be complete within timeout_s={job.deadline - job.submitted:.3g}; the "
            f"request was still {job.state}. Ask with a larger timeout_s, or when fewer requests are running."))
            for job in self._timed
            if job.deadline is not None and job.deadline <= now
        ]  # fmt: skip

    def next_deadline(self) -> float | None:
        """The earliest deadline, in seconds of the engine's clock."""
        return min((job.deadline for job in self._timed if job.deadline is not None), default=None)

    def integrity(self) -> None:
        """Check that every slot is free or belongs to one admitted request, and that queues and states agree.

        Raises:
            RuntimeError: a check failed; the message says which.
        """
        held = [job.slot for job in self._admitted if job.slot is not None]
        if sorted([*held, *self._free_slots]) != list(range(self._slots)):
            raise RuntimeError("scheduler: a row slot is lost, or has two owners")
        if any(job.state in ENDED or job.state is State.WAITING for job in self._admitted):
            raise RuntimeError("scheduler: a request that is not admitted holds memory")
        if set(self._timed) != {job for job in self if job.deadline is not None}:
            raise RuntimeError("scheduler: a deadline is lost, or is of a request that has ended")
        for queue in self._queues.values():
            if any(job.state is not State.WAITING or job.slot is not None for job in queue):
                raise RuntimeError("scheduler: a request in the queue is not waiting")
            if [job.number for job in queue] != sorted(job.number for job in queue):
                raise RuntimeError("scheduler: the queue is out of order")

    def _first(self, now: float) -> J | None:
        """The waiting request that is admitted next, if memory allows."""
        heads = [queue[0] for queue in self._queues.values() if queue and self._may(queue[0])]
        return min(heads, key=lambda job: self._rank(job, now), default=None)

    def _rank(self, job: J, now: float) -> tuple[int, int]:
        risen = int((now - job.submitted) / AGEING_S)
        return max(0, job.priority - risen), job.number

    def _may(self, job: J) -> bool:
        """Whether there is a place for it, apart from memory."""
        if job.priority is Priority.REGISTRATION:
            return sum(each.priority is Priority.REGISTRATION for each in self._admitted) < REGISTRATIONS
        return bool(self._free_slots) if job.decodes else len(self._admitted) < self._slots

    def _take_slot(self) -> int:
        """Take the lowest free slot, so that few rows need no large pass."""
        slot = min(self._free_slots)
        self._free_slots.remove(slot)
        return slot

    def _give_back(self, job: J) -> None:
        del self._admitted[job]
        if job.slot is not None:
            self._free_slots.append(job.slot)
            job.slot = None
        self._memory.release(job)

    def _move(self, job: J, state: State) -> None:
        self._check(job, state)
        job.state = state

    def _check(self, job: J, state: State) -> None:
        if state not in TRANSITIONS[job.state]:
            raise RuntimeError(f"scheduler: a request can't go from {job.state} to {state}")
