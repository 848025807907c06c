"""The scheduler as a table of states: who is admitted, in which order, and what a step computes.

Nothing here computes anything: memory is a number of pages, and the clock is a number.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from braidsdk.engine.scheduler import AGEING_S, REGISTRATIONS, Job, Priority, Scheduler, State
from braidsdk.errors import DeadlineError, QueueFullError

QUESTION, REPAIR, REGISTRATION = Priority.QUESTION, Priority.REPAIR, Priority.REGISTRATION
STEP, PIECE = 100, 10
FOREVER = 1e9


@dataclass(eq=False, kw_only=True)
class Asked(Job):
    """A request that needs some pages."""

    pages: int = 1


@dataclass
class Pages:
    """Memory that is a number."""

    capacity: int
    taken: dict[Asked, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return self.capacity - sum(self.taken.values())

    def admit(self, request: Asked) -> bool:
        assert request not in self.taken, "admitted twice"
        if request.pages > self.free:
            return False
        self.taken[request] = request.pages
        return True

    def release(self, request: Asked) -> None:
        del self.taken[request]


def asked(
    priority: Priority = QUESTION,
    at: float = 0.0,
    *,
    decodes: bool = True,
    pages: int = 1,
    deadline: float | None = None,
) -> Asked:
    return Asked(priority=priority, submitted=at, decodes=decodes, pages=pages, deadline=deadline)


def scheduler(
    pages: int = 1000, *, slots: int = 4, max_queue: int = 1000, piece_tokens: int = PIECE, joins: int = 1000
) -> Scheduler[Asked]:
    return Scheduler(
        Pages(pages), max_queue=max_queue, step_tokens=STEP, piece_tokens=piece_tokens, joins=joins, slots=slots
    )


def submitted(queue: Scheduler[Asked], *jobs: Asked) -> None:
    for job in jobs:
        queue.submit(job)


# the table of states

PATH = [State.WAITING, State.LOADING, State.READY, State.RUNNING, State.FINISHED]

ALLOWED = {
    (State.WAITING, State.LOADING),
    (State.LOADING, State.READY),
    (State.READY, State.RUNNING),
    (State.RUNNING, State.FINISHED),
    *((state, end) for state in PATH[:-1] for end in (State.FAILED, State.CANCELLED)),
}
"""As the module's docstring says it."""

MOVES: dict[State, Callable[[Scheduler[Asked], Asked], object]] = {
    State.LOADING: lambda queue, job: queue.admit(0.0),
    State.READY: lambda queue, job: queue.ready(job, 5),
    State.RUNNING: lambda queue, job: queue.running(job),
    State.FINISHED: lambda queue, job: queue.end(job, State.FINISHED),
    State.FAILED: lambda queue, job: queue.end(job, State.FAILED),
    State.CANCELLED: lambda queue, job: queue.end(job, State.CANCELLED),
}

ENDS = (State.FINISHED, State.FAILED, State.CANCELLED)


def brought_to(state: State, job: Asked | None = None) -> tuple[Scheduler[Asked], Asked]:
    """A scheduler with one request, in that state."""
    queue, job = scheduler(), job or asked()
    queue.submit(job)
    way = PATH[1 : PATH.index(state) + 1] if state in PATH else [State.LOADING, state]
    for each in way:
        MOVES[each](queue, job)
    assert job.state is state
    return queue, job


@pytest.mark.parametrize(("before", "after"), sorted(ALLOWED), ids=lambda state: str(state))
def test_an_allowed_transition_is_made(before: State, after: State) -> None:
    queue, job = brought_to(before)
    MOVES[after](queue, job)
    assert job.state is after
    queue.integrity()


@pytest.mark.parametrize(
    ("before", "after"),
    [(a, b) for a in State for b in MOVES if (a, b) not in ALLOWED and a not in ENDS and b is not State.LOADING],
    ids=lambda state: str(state),
)
def test_a_transition_that_is_not_in_the_table_raises_and_changes_nothing(before: State, after: State) -> None:
    queue, job = brought_to(before)
    slot, waiting, admitted = job.slot, queue.waiting, queue.admitted
    with pytest.raises(RuntimeError, match=f"can't go from {before} to {after}"):
        MOVES[after](queue, job)
    assert (job.state, job.slot, queue.waiting, queue.admitted) == (before, slot, waiting, admitted)
    queue.integrity()


@pytest.mark.parametrize("before", [state for state in State if state is not State.WAITING], ids=str)
def test_only_a_request_that_waits_is_admitted(before: State) -> None:
    queue, job = brought_to(before)
    assert queue.admit(0.0) == []
    assert job.state is before


@pytest.mark.parametrize("again", ENDS, ids=str)
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_request_ends_once_whoever_asks_again(end: State, again: State) -> None:
    queue, job = brought_to(end)
    assert not queue.end(job, again)
    assert job.state is end
    for move in (State.READY, State.RUNNING):
        with pytest.raises(RuntimeError, match=f"can't go from {end}"):
            MOVES[move](queue, job)


@pytest.mark.parametrize("state", [State.LOADING, State.READY, State.RUNNING], ids=str)
@pytest.mark.parametrize("end", [State.FAILED, State.CANCELLED], ids=str)
def test_what_a_request_holds_is_given_back_when_it_ends(state: State, end: State) -> None:
    memory = Pages(5)
    queue = Scheduler(memory, max_queue=9, step_tokens=STEP, piece_tokens=PIECE, slots=1)
    first, second = asked(pages=5), asked(pages=5)
    submitted(queue, first, second)
    assert queue.admit(0.0) == [first]
    for each in PATH[2 : PATH.index(state) + 1]:
        MOVES[each](queue, first)
    assert queue.admit(0.0) == []
    assert queue.end(first, end)
    assert first.slot is None
    assert memory.taken == {}
    assert queue.admit(0.0) == [second]
    assert second.slot == 0


def test_a_request_that_waits_holds_nothing_and_leaves_the_queue_when_it_ends() -> None:
    memory = Pages(1)
    queue = Scheduler(memory, max_queue=9, step_tokens=STEP, piece_tokens=PIECE)
    first, second, third = asked(), asked(), asked()
    submitted(queue, first, second, third)
    assert queue.admit(0.0) == [first]
    assert queue.end(second, State.CANCELLED)
    assert (queue.waiting, list(queue), list(memory.taken)) == (1, [first, third], [first])
    queue.integrity()


# order


def test_priority_goes_before_arrival_and_arrival_decides_among_equals() -> None:
    queue = scheduler(slots=9)
    jobs = [asked(priority) for priority in (REGISTRATION, QUESTION, REPAIR, QUESTION, REGISTRATION, REPAIR)]
    submitted(queue, *jobs)
    assert queue.admit(0.0) == [jobs[i] for i in (1, 3, 2, 5, 0, 4)]


@pytest.mark.parametrize("priority", [REPAIR, REGISTRATION], ids=lambda priority: priority.name.lower())
def test_who_waits_rises_by_one_priority_at_a_time_and_then_goes_by_arrival(priority: Priority) -> None:
    early, late = asked(priority), asked(QUESTION, at=1.0)
    for now, first in ((priority * AGEING_S - 0.01, late), (priority * AGEING_S, early)):
        queue = scheduler(pages=1)
        submitted(queue, early, late)
        assert queue.admit(now) == [first]
        for job in (early, late):
            job.state, job.slot = State.WAITING, None


def test_who_has_risen_does_not_overtake_a_question_that_came_before_it() -> None:
    queue = scheduler(pages=1)
    question, registration = asked(), asked(REGISTRATION)
    submitted(queue, question, registration)
    assert queue.admit(100 * AGEING_S) == [question]


@pytest.mark.parametrize("priority", [REPAIR, REGISTRATION], ids=lambda priority: priority.name.lower())
def test_a_stream_of_questions_holds_up_the_rest_only_so_long(priority: Priority) -> None:
    queue, late, now = scheduler(pages=1), asked(priority), 0.0
    busy = asked()
    submitted(queue, busy, late)
    assert queue.admit(now) == [busy]
    while late.state is State.WAITING:
        queue.submit(asked(at=now))
        queue.submit(asked(at=now))
        now += 0.5
        assert now <= priority * AGEING_S + 0.5, "it waits for ever"
        queue.end(busy, State.FAILED)
        (busy,) = queue.admit(now)
    assert now >= priority * AGEING_S, "it overtook questions that it should have let go first"


def test_nothing_overtakes_the_first_in_order_because_it_is_smaller() -> None:
    queue = scheduler(pages=10)
    running, large, small, urgent = asked(pages=4), asked(REPAIR, pages=8), asked(REPAIR, pages=1), asked(pages=1)
    submitted(queue, running)
    assert queue.admit(0.0) == [running]
    submitted(queue, large, small)
    assert queue.admit(0.0) == []
    submitted(queue, urgent)
    assert queue.admit(0.0) == [urgent], "it comes before the large one by its priority"
    queue.end(running, State.FAILED)
    assert queue.admit(0.0) == [large, small]


def test_a_large_question_does_not_wait_behind_registrations_that_have_no_place() -> None:
    queue = scheduler()
    registrations = [asked(REGISTRATION, decodes=False) for _ in range(REGISTRATIONS + 1)]
    submitted(queue, *registrations)
    assert queue.admit(0.0) == registrations[:REGISTRATIONS]
    question = asked(at=9 * AGEING_S)
    submitted(queue, question)
    assert queue.admit(10 * AGEING_S) == [question], "the registration is older, and has no place"


# bounds


def test_only_so_many_registrations_are_admitted_at_once() -> None:
    queue = scheduler(slots=9)
    jobs = [asked(REGISTRATION, decodes=False) for _ in range(REGISTRATIONS + 2)]
    submitted(queue, *jobs)
    assert queue.admit(0.0) == jobs[:REGISTRATIONS]
    assert queue.admit(0.0) == []
    queue.end(jobs[1], State.CANCELLED)
    assert queue.admit(0.0) == [jobs[REGISTRATIONS]]
    assert queue.waiting == 1


def test_one_request_more_than_may_wait_is_refused_and_the_queue_stays_as_it_was() -> None:
    queue = scheduler(pages=1, max_queue=2)
    first, second, third, fourth = asked(), asked(REGISTRATION), asked(), asked()
    submitted(queue, first)
    assert queue.admit(0.0) == [first]
    submitted(queue, second, third)
    with pytest.raises(QueueFullError, match="fewer than 2 waiting"):
        queue.submit(fourth)
    assert list(queue) == [first, third, second]
    queue.end(second, State.CANCELLED)
    queue.submit(fourth)
    assert queue.waiting == 2


def test_the_lowest_free_slot_is_taken() -> None:
    queue = scheduler(slots=4)
    jobs = [asked() for _ in range(6)]
    submitted(queue, *jobs)
    assert [job.slot for job in queue.admit(0.0)] == [0, 1, 2, 3]
    queue.end(jobs[2], State.FAILED)
    queue.end(jobs[0], State.FAILED)
    assert [job.slot for job in queue.admit(0.0)] == [0, 2]


def test_what_does_not_decode_takes_no_slot() -> None:
    queue = scheduler(slots=2)
    submitted(queue, asked(decodes=False), asked(), asked())
    assert [job.slot for job in queue.admit(0.0)] == [None, 0, 1]


def test_few_join_in_one_step_while_others_decode() -> None:
    queue = scheduler(slots=16, joins=2, piece_tokens=60)
    running, *news = [asked() for _ in range(6)]
    text = asked(decodes=False)
    submitted(queue, running, *news, text)
    queue.admit(0.0)
    for job in (running, *news, text):
        queue.ready(job, 10)
    long = news[2]
    long.to_prefill = 50  # does not end in this step, so it does not join
    assert [job for job, _ in queue.next(0.0, ()).pieces][:6] == [running, *news]  # nobody waits for a token
    queue.running(running)
    pieces = queue.next(0.0, (running,)).pieces
    assert pieces == ((news[0], 10), (news[1], 10), (long, 40))
    long.to_prefill = 10
    assert [job for job, _ in queue.next(0.0, (running,)).pieces] == [news[0], news[1], text]


# deadlines


def test_the_next_deadline_is_the_earliest_of_all_that_have_not_ended() -> None:
    queue = scheduler(pages=1)
    assert queue.next_deadline() is None
    running, waiting, patient = asked(deadline=7.0), asked(deadline=3.0), asked()
    submitted(queue, running, waiting, patient)
    queue.admit(0.0)
    assert queue.next_deadline() == 3.0
    queue.end(waiting, State.FAILED)
    assert queue.next_deadline() == 7.0
    queue.end(running, State.FINISHED if running.state is State.RUNNING else State.FAILED)
    assert queue.next_deadline() is None


@pytest.mark.parametrize("state", PATH[:-1], ids=str)
def test_a_deadline_ends_a_request_in_any_state_and_says_what_it_was(state: State) -> None:
    queue, job = brought_to(state, asked(at=2.0, deadline=4.5))
    assert queue.expired(4.49) == []
    ((found, error),) = queue.expired(4.5)
    assert found is job
    assert isinstance(error, DeadlineError)
    assert "timeout_s=2.5" in str(error)
    assert f"still {state}" in str(error)
    queue.end(job, State.FAILED)
    assert queue.expired(FOREVER) == []


# what a step computes


def admitted(*prefills: int, priority: Priority = QUESTION) -> tuple[Scheduler[Asked], list[Asked]]:
    """A scheduler with requests that have this much to prefill."""
    queue, jobs = scheduler(), [asked(priority) for _ in prefills]
    submitted(queue, *jobs)
    assert queue.admit(0.0) == jobs
    for job, tokens in zip(jobs, prefills, strict=True):
        queue.ready(job, tokens)
    return queue, jobs


def test_prefill_takes_the_whole_step_where_nothing_decodes() -> None:
    queue, (a, b, c) = admitted(60, 70, 5)
    assert queue.next(0.0, ()).pieces == ((a, 60), (b, 40))
    assert queue.prefilled(a, 60)
    assert not queue.prefilled(b, 40)
    queue.running(a)
    assert queue.next(0.0, ()).pieces == ((b, 30), (c, 5))


def test_prefill_takes_a_piece_of_a_step_while_rows_decode() -> None:
    queue, (a, b, c) = admitted(0, 7, 70)
    queue.running(a)
    work = queue.next(0.0, (a,))
    assert work.rows == (a,)
    assert work.pieces == ((b, 7), (c, PIECE - 7))


def test_a_step_without_anything_to_do_is_false() -> None:
    queue, (a,) = admitted(3)
    assert queue.next(0.0, ())
    queue.end(a, State.CANCELLED)
    assert not queue.next(0.0, ())


def test_questions_prefill_before_registrations_that_were_admitted_earlier() -> None:
    queue, (registration,) = admitted(500, priority=REGISTRATION)
    question = asked(at=1.0)
    submitted(queue, question)
    queue.admit(1.0)
    queue.ready(question, 30)
    assert queue.next(1.0, ()).pieces == ((question, 30), (registration, 70))


# all of it at random


class Random(RuleBasedStateMachine):
    """Requests of all kinds come, are admitted, computed and ended in any order, in memory that grows and shrinks."""

    MAX_QUEUE, SLOTS = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.memory = Pages(10)
        self.scheduler = Scheduler(
            self.memory, max_queue=self.MAX_QUEUE, step_tokens=STEP, piece_tokens=PIECE, slots=self.SLOTS
        )
        self.jobs: list[Asked] = []  # that were taken

    def of(self, *states: State) -> list[Asked]:
        return [job for job in self.jobs if job.state in states]

    @rule(
        priority=st.sampled_from(Priority),
        decodes=st.booleans(),
        pages=st.integers(0, 10),
        timeout=st.none() | st.floats(0.0, 20.0),
    )
    def arrive(self, priority: Priority, decodes: bool, pages: int, timeout: float | None) -> None:
        deadline = None if timeout is None else self.now + timeout
        decodes = decodes and priority is not REGISTRATION
        job = asked(priority, self.now, decodes=decodes, pages=pages, deadline=deadline)
        if len(self.of(State.WAITING)) == self.MAX_QUEUE:
            with pytest.raises(QueueFullError):
                self.scheduler.submit(job)
        else:
            self.scheduler.submit(job)
            self.jobs.append(job)

    @rule()
    def admit(self) -> None:
        want = self.expected()
        got = self.scheduler.admit(self.now)
        assert got == want
        assert all(job.state is State.LOADING for job in got)

    def rank(self, job: Asked) -> tuple[int, int]:
        risen = int((self.now - job.submitted) // AGEING_S)
        return max(0, job.priority - risen), self.jobs.index(job)

    def expected(self) -> list[Asked]:
        """Whom to admit, by the plainest reading of the rules."""
        admitted = [job for job in self.jobs if job in self.memory.taken]
        slots = self.SLOTS - sum(job.slot is not None for job in admitted)
        waiting, free, chosen = self.of(State.WAITING), self.memory.free, []

        def has_place(job: Asked) -> bool:
            if job.priority is REGISTRATION:
                return sum(each.priority is REGISTRATION for each in admitted) < REGISTRATIONS
            return slots > 0 if job.decodes else len(admitted) < self.SLOTS

        while True:
            heads = [next((job for job in waiting if job.priority is priority), None) for priority in Priority]
            first = min((job for job in heads if job and has_place(job)), key=self.rank, default=None)
            if first is None or first.pages > free:
                return chosen
            free -= first.pages
            slots -= first.decodes
            for each in (admitted, chosen):
                each.append(first)
            waiting.remove(first)

    @precondition(lambda self: self.of(State.LOADING))
    @rule(data=st.data(), tokens=st.integers(0, 2 * STEP))
    def load(self, data: st.DataObject, tokens: int) -> None:
        job = data.draw(st.sampled_from(self.of(State.LOADING)))
        self.scheduler.ready(job, tokens)
        if not tokens:
            self.scheduler.running(job)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        rows = tuple(job for job in self.of(State.RUNNING) if job.decodes)
        left = {job: job.to_prefill for job in self.of(State.READY)}
        work = self.scheduler.next(self.now, rows)
        assert work.rows == rows
        budget = PIECE if rows else STEP
        assert sum(tokens for _, tokens in work.pieces) == min(budget, sum(left.values()))
        ranks = [self.rank(job) for job, _ in work.pieces]
        assert ranks == sorted(ranks)
        assert all(tokens == left[job] for job, tokens in work.pieces[:-1]), "only the last one is cut"
        for job, tokens in work.pieces:
            if data.draw(st.integers(0, 9)) == 0:
                self.scheduler.end(job, State.FAILED)
            elif self.scheduler.prefilled(job, tokens):
                self.scheduler.running(job)
            assert job.to_prefill >= 0

    @precondition(lambda self: any(self.scheduler))
    @rule(data=st.data(), state=st.sampled_from(ENDS))
    def end(self, data: st.DataObject, state: State) -> None:
        job = data.draw(st.sampled_from(list(self.scheduler)))
        if state is State.FINISHED and job.state is not State.RUNNING:
            with pytest.raises(RuntimeError):
                self.scheduler.end(job, state)
        else:
            assert self.scheduler.end(job, state)

    @rule(seconds=st.floats(0.0, 2 * AGEING_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for job, _ in self.scheduler.expired(self.now):
            assert self.scheduler.end(job, State.FAILED)
        deadline = self.scheduler.next_deadline()
        assert deadline is None or deadline > self.now

    @rule(capacity=st.integers(0, 20))
    def memory_changes(self, capacity: int) -> None:
        self.memory.capacity = max(capacity, sum(self.memory.taken.values()))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.scheduler.integrity()
        waiting, held = self.of(State.WAITING), self.of(State.LOADING, State.READY, State.RUNNING)
        assert set(self.scheduler) == {*waiting, *held}
        assert (self.scheduler.waiting, self.scheduler.admitted) == (len(waiting), len(held))
        assert self.memory.taken.keys() == set(held)
        slots = [job.slot for job in held if job.decodes]
        assert None not in slots
        assert len(set(slots)) == len(slots)
        assert all(job.slot is None for job in self.jobs if job not in held or not job.decodes)

    def teardown(self) -> None:
        """With room enough everybody gets to the end."""
        self.memory.capacity = FOREVER  # type: ignore[assignment]
        for _ in range(20 * len(self.jobs)):
            self.admit()
            for job in self.of(State.LOADING):
                self.scheduler.ready(job, 30)
            for job, tokens in self.scheduler.next(self.now, ()).pieces:
                if self.scheduler.prefilled(job, tokens):
                    self.scheduler.running(job)
            for job in self.of(State.RUNNING):
                assert self.scheduler.end(job, State.FINISHED)
            self.nothing_is_lost()
        assert list(self.scheduler) == []
        assert self.memory.taken == {}
        assert all(job.state in ENDS for job in self.jobs)


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
