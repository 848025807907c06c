"""What requests need in memory, one thing at a time: I/O jobs and what they post are run by hand, in any order.

Whatever lies on a page is a number that says whose it is, so that a page with two owners is seen.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from braidsdk.cache.pool import Pool
from braidsdk.cache.rates import Rates
from braidsdk.cache.residency import Residency
from braidsdk.cache.resident import Resident
from braidsdk.cache.resident import State as EntryState
from braidsdk.errors import StoreError
from braidsdk.store import Entry, EntryKey, ModelIdentity, Tensors, sha256_of_tokens
from braidsdk.types import LEVEL_CONTEXT, LEVEL_OVERLAY, LEVEL_QUERY

MODEL = ModelIdentity("w", "t", "float32", "none", 2, 1, 2, "{}")
PAGE, SHARED_PAGE = 4, 128


def key(chunk: str | None, tokens: int, after: tuple[str, ...] = (), level: int = LEVEL_CONTEXT) -> EntryKey:
    return EntryKey(MODEL, "default", chunk, level, tuple(range(tokens)), after, sha256_of_tokens(()))


KEYS = (key("a", 3), key("b", 8), key("c", 5), key("d", 1), key("e", 9, after=("a",)), key("f", 4, after=("b",)))
"""One to three pages each; two were computed with sight of another chunk."""

SMALL = (key("a", 22), key("b", 64), key("c", 40), key("d", 1), key("e", 200, after=("a",)), key("f", 31, after=("b",)))
"""The same chunks, most of which share pages of 128 tokens."""

OVERLAYS = tuple(key(None, tokens, after, LEVEL_OVERLAY) for tokens in (2, 6) for after in (("a",), ("b", "c")))
"""One or two pages each."""

MARKS = {each: float(place + 1) for place, each in enumerate((*KEYS, *SMALL, *OVERLAYS))}
"""What lies on the pages of each."""


@dataclass(eq=False)
class Asked:
    """A request, as far as memory is concerned."""

    keys: tuple[EntryKey, ...]
    keeps: tuple[bool, ...]
    reserved: int = 1
    computes: frozenset[EntryKey] = frozenset()
    scratch: int = 0
    overlay: int = 0
    state: str = "new"
    namespace: str = "default"
    error: BaseException | None = None

    def needs(self, wanted: EntryKey) -> bool:
        return wanted in self.keys


@dataclass
class ByHand:
    """A thread pool that runs its jobs when a test says so."""

    jobs: deque[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=deque)

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        self.jobs.append((work, arguments))

    def run(self, place: int = 0) -> None:
        work, arguments = self.jobs[place]
        del self.jobs[place]
        work(*arguments)


@dataclass
class FakeStore:
    """Which entries are kept, and what goes wrong with the next job."""

    kept: set[EntryKey] = field(default_factory=set)
    read_fails_after: int | None = None
    write_fails: bool = False
    read: list[EntryKey] = field(default_factory=list)
    written: list[EntryKey] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)

    def count_uses(self, digests: Iterable[str]) -> None:
        self.used.update(digests)

    def stream(self, keys: Sequence[EntryKey], place: Callable[[EntryKey], Tensors]) -> Iterator[Entry | None]:
        for count, each in enumerate(keys):
            self.read.append(each)
            if self.read_fails_after == count:
                raise StoreError("The disk can't be read.")
            if each not in self.kept:
                yield None
                continue
            mark, there = torch.tensor([MARKS[each]]).numpy().tobytes(), place(each)
            for buffer in (buffer for tensor in there.values() for buffer in tensor.buffers):
                buffer[:] = mark * (len(buffer) // len(mark))
            yield Entry(each, there, 1, {})

    def publish(self, publications: Sequence[tuple[EntryKey, Tensors, object]]) -> None:
        for each, tensors, _ in publications:
            self.written.append(each)
            for tensor in tensors.values():
                data = torch.frombuffer(bytearray(b"".join(tensor.buffers)), dtype=torch.float32)
                assert data.numel() == math.prod(tensor.shape)
                assert (data == MARKS[each]).all(), "written while something else lies there"
        if self.write_fails:
            raise StoreError("The disk is full.")
        self.kept |= {each for each, _, _ in publications}


class Bench:
    """A residency with its owner, its store and its threads, all run by hand."""

    def __init__(self, pages: int = 12, page: int = PAGE, keys: Sequence[EntryKey] = KEYS, device: str = "cpu") -> None:
        cpu = torch.device("cpu")
        self.keys = keys
        self.pool = Pool(
            layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, device=cpu,
            capacity_bytes=pages * 2 * 2 * page * 2 * 4, page_size=page,
        )  # fmt: skip
        self.store = FakeStore()
        model = SimpleNamespace(device=SimpleNamespace(type=device), dtype=torch.float32)
        self.residency: Residency[Asked] = Residency(
            model, self.pool, self.store, MODEL, Rates("test", {}), owner=self  # type: ignore[arg-type]
        )  # fmt: skip
        for pool in (self.residency._readers, self.residency._writers):
            pool.shutdown()
        self.readers, self.writers = ByHand(), ByHand()
        self.residency._readers, self.residency._writers = self.readers, self.writers  # type: ignore[assignment]
        self.posted: deque[Callable[[], None]] = deque()
        self.live: list[Asked] = []
        self.whole: set[Resident] = set()
        self.computed: list[EntryKey] = []

    # the owner

    def post(self, work: Callable[[], None]) -> None:
        self.posted.append(work)

    def on_ready(self, request: Asked) -> None:
        assert request.state == "loading", "told twice, or after its end"
        request.state = "ready"
        own = self.residency.to_compute(request)
        for entry in self.residency[request].pinned:
            assert entry in self.whole or entry in own, "ready without an entry"
        others = [other for other in self.live if other is not request and other.state == "ready"]
        assert not any(entry in self.residency.to_compute(other) for other in others for entry in own), "two compute it"

    def on_written(self, request: Asked) -> None:
        assert request.state == "writing"
        if not self.residency[request].writes:
            self.finish(request)

    def on_failed(self, request: Asked, error: BaseException) -> None:
        request.error = error
        self.end(request, "failed")

    # what an engine does with a request

    def submit(
        self,
        *chunks: str,
        keep: bool = True,
        reserved: int = 1,
        fresh: bool = False,
        scratch: int = 0,
        overlay: int = 0,
    ) -> Asked:
        """Ask for the entries of these chunks; `fresh`: those that the store lacks are known to be lacking."""
        keys = tuple(each for name in chunks for each in self.keys if each.chunk_id == name)
        lacking = frozenset(each for each in keys if each not in self.store.kept) if fresh else frozenset()
        request = Asked(keys, (keep,) * len(keys), reserved, lacking, scratch, overlay)
        room, used = self.pool.room, self.pool.used_bytes
        if self.residency.admit(request):
            request.state = "loading"
            self.live.append(request)
            self.residency.start(request)
        else:
            assert (self.pool.room, self.pool.used_bytes) == (room, used), "refused, and something was taken"
        return request

    def keep_overlay(self, request: Asked, overlay: EntryKey) -> None:
        """A ready request has chosen what it computes again, and keeps it."""
        assert request.state == "ready"
        request.state = "loading"
        self.residency.keep_overlay(request, overlay)

    def compute(self, request: Asked, entries: int | None = None) -> None:
        """Compute what a ready request has to, all of it or only so many entries; then write what it keeps."""
        assert request.state == "ready"
        for entry in self.residency.to_compute(request)[:entries]:
            assert entry not in self.whole, "computed twice"
            self.pool.kv[:, :, entry.pages, :, entry.places] = MARKS[entry.key]
            self.computed.append(entry.key)
            self.whole.add(entry)
            self.residency.computed(entry)
        if not self.residency.to_compute(request):
            if self.residency.write(request, 1, 0.0):
                request.state = "writing"
            else:
                self.finish(request)

    def finish(self, request: Asked) -> None:
        for entry, keep in zip(self.residency[request].entries, request.keeps, strict=True):
            kept = entry.key in self.store.kept
            assert kept or not keep or entry.state is EntryState.DROPPED, "finished and not stored"
        self.end(request, "finished")

    def end(self, request: Asked, state: str = "cancelled") -> None:
        request.state = state
        self.live.remove(request)
        self.residency.release(request)

    def delete(self, *chunks: str) -> None:
        for entry in self.pool.drop_chunks(set(chunks)):
            self.store.kept.discard(entry.key)

    # threads and mail

    def read(self) -> None:
        """Let the first read job run, and its mail be read."""
        self.readers.run()
        self.deliver()

    def write(self) -> None:
        self.writers.run()
        self.deliver()

    def deliver(self, count: int | None = None) -> None:
        for _ in range(len(self.posted) if count is None else count):
            work: Any = self.posted.popleft()
            what, (subject, *more) = work.func.__name__, work.args
            if what == "_loaded":
                assert subject not in self.whole, "loaded twice"
                self.whole.add(subject)
            holders = {request: self.residency[request].pinned for request in self.live}
            work()
            troubled = [subject] if what == "_not_loaded" else subject.entries if what == "_published" else []
            for request in holders.keys() - set(self.live):
                if request.state == "failed":
                    assert more[0] is request.error
                    assert not set(troubled).isdisjoint(holders[request]), "it did not need what failed"
            self.check()

    def check(self) -> None:
        self.residency.integrity()
        there = {*self.pool._entries.values(), *(entry for each in self.live for entry in self.residency[each].pinned)}
        for entry in there & self.whole:
            if entry.key.level != LEVEL_QUERY:
                first = self.pool.kv[:, :, entry.pages, :, entry.offset]
                assert (first == MARKS[entry.key]).all(), "something else lies on its pages"

    def check_all_is_given_back(self) -> None:
        self.check()
        assert not self.live
        assert not self.pool._pins
        assert not self.residency._making
        assert not self.residency._writing
        assert not self.residency._held
        assert self.pool.room == self.pool.capacity_pages


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench; at the end of each test everything must have been given back."""
    made = Bench()
    yield made
    for request in list(made.live):
        made.end(request)
        made.check()
    while made.readers.jobs or made.writers.jobs or made.posted:
        for threads in (made.readers, made.writers):
            if threads.jobs:
                threads.run()
        made.deliver()
    made.check_all_is_given_back()


# one at a time


def test_a_stored_entry_is_read_once_for_all_who_need_it(bench: Bench) -> None:
    bench.store.kept = set(MARKS)
    first, second = bench.submit("a", "b"), bench.submit("b", "a")
    assert (first.state, second.state) == ("loading", "loading")
    assert len(bench.readers.jobs) == 1
    bench.read()
    assert (first.state, second.state) == ("ready", "ready")
    third = bench.submit("a")
    assert third.state == "ready", "it is in memory"
    for request in (first, second, third):
        bench.compute(request)
        assert request.state == "finished"
    assert Counter(bench.store.read) == Counter(KEYS[:2])
    assert bench.store.written == bench.computed == []


def test_a_missing_entry_is_computed_by_the_first_and_the_others_wait_for_it(bench: Bench) -> None:
    first, second = bench.submit("a", "b"), bench.submit("b", "c")
    bench.read()
    bench.read()
    assert (first.state, second.state) == ("ready", "loading")
    assert [entry.key.chunk_id for entry in bench.residency.to_compute(second)] == ["b", "c"]
    bench.compute(first)
    assert second.state == "ready"
    assert [entry.key.chunk_id for entry in bench.residency.to_compute(second)] == ["c"]
    bench.compute(second)
    bench.write()
    bench.write()
    assert (first.state, second.state) == ("finished", "finished")
    assert Counter(bench.computed) == Counter(bench.store.written) == Counter(KEYS[:3])


def test_requests_that_need_each_others_entries_do_not_wait_in_a_circle(bench: Bench) -> None:
    first, second = bench.submit("a", "b", fresh=True), bench.submit("b", "a", fresh=True)
    third = bench.submit("b", fresh=True)
    assert [each.state for each in (first, second, third)] == ["ready", "loading", "loading"]
    bench.compute(first, 1)
    assert [each.state for each in (second, third)] == ["loading", "loading"]
    bench.end(first)
    assert [each.state for each in (second, third)] == ["ready", "loading"]
    bench.compute(second)
    assert third.state == "ready"


def test_if_who_computes_an_entry_is_cancelled_the_next_takes_over(bench: Bench) -> None:
    first, second, third = (bench.submit("b", fresh=True) for _ in range(3))
    assert [each.state for each in (first, second, third)] == ["ready", "loading", "loading"]
    bench.end(second)
    bench.end(first)
    assert third.state == "ready"
    bench.compute(third)
    bench.write()
    assert third.state == "finished"
    assert bench.computed == [KEYS[1]]


def test_an_entry_that_nobody_computes_any_more_is_forgotten(bench: Bench) -> None:
    request = bench.submit("b", fresh=True)
    bench.end(request)
    assert bench.pool.find(KEYS[1]) is None
    assert bench.pool.used_bytes == 0


def test_pages_that_a_thread_reads_into_stay_taken_when_the_request_has_gone(bench: Bench) -> None:
    bench.store.kept = set(MARKS)
    gone = bench.submit("b", "e")
    bench.end(gone)
    other = bench.submit(*"acd", reserved=13, fresh=True)
    assert other.state == "new", "there are twelve pages, and five are being read into"
    again = bench.submit("b")
    assert again.state == "loading"
    bench.read()
    assert again.state == "ready"
    assert len(bench.store.read) == 2


def test_a_request_that_does_not_fit_takes_nothing_and_pins_nothing(bench: Bench) -> None:
    bench.compute(bench.submit("a", "b", fresh=True), 0)
    refused = bench.submit("a", "b", "c", reserved=9 * PAGE)
    assert refused.state == "new"
    assert all(count == 1 for count in bench.pool._pins.values())
    bench.check()


def test_scratch_and_overlay_are_pages_of_the_request(bench: Bench) -> None:
    request = bench.submit("a", fresh=True, scratch=3 * PAGE, overlay=PAGE + 1)
    assert bench.submit("b", scratch=9 * PAGE).state == "new", "they are not counted"
    before = bench.pool.room
    bench.residency.leave_scratch(request)
    assert bench.pool.room == before + 3
    bench.check()
    bench.end(request, "done")
    assert bench.pool.room == before + 3 + 2 + 1 + 1, "the overlay, the tail and the entry that was not computed"
    bench.check()


def test_a_read_error_fails_only_those_who_need_what_was_not_read(bench: Bench) -> None:
    bench.store.kept = set(MARKS)
    first, needs_good, needs_bad = bench.submit("a", "b", "c"), bench.submit("a"), bench.submit("c", "d")
    bench.store.read_fails_after = 1
    bench.read()
    assert first.state == needs_bad.state == "failed"
    assert isinstance(first.error, StoreError)
    assert needs_good.state == "ready"
    bench.store.read_fails_after = None
    bench.read()
    again = bench.submit("b", "c")
    bench.read()
    assert again.state == "ready", "what was not read once is read by the next"


def test_a_write_error_fails_only_who_waits_for_it_and_the_next_writes_again(bench: Bench) -> None:
    keeps, waits, other = bench.submit("a", fresh=True), bench.submit("a"), bench.submit("a", keep=False)
    later = bench.submit("b", fresh=True)
    for request in (keeps, waits, other, later):
        bench.compute(request)
    assert [each.state for each in (keeps, waits, other, later)] == ["writing", "writing", "finished", "writing"]
    assert len(bench.writers.jobs) == 2
    bench.store.write_fails = True
    bench.write()
    assert [each.state for each in (keeps, waits, later)] == ["failed", "failed", "writing"]
    assert "keep=False" in str(keeps.error)
    bench.store.write_fails = False
    bench.write()
    assert later.state == "finished"
    again = bench.submit("a")
    assert again.state == "ready", "the entry is good, and in memory"
    bench.compute(again)
    bench.write()
    assert again.state == "finished"
    assert KEYS[0] in bench.store.kept
    assert bench.computed.count(KEYS[0]) == 1


def test_what_was_computed_without_keeping_is_written_by_the_first_who_keeps_it(bench: Bench) -> None:
    bench.compute(bench.submit("a", keep=False, fresh=True))
    assert not bench.writers.jobs
    bench.compute(bench.submit("a"))
    bench.write()
    assert bench.store.written == [KEYS[0]]


def test_an_entry_that_the_store_has_lost_is_written_again_from_memory(bench: Bench) -> None:
    bench.compute(bench.submit("a", fresh=True))
    bench.write()
    bench.store.kept.clear()
    again = bench.submit("a", fresh=True)
    bench.compute(again)
    bench.write()
    assert again.state == "finished"
    assert bench.store.written == [KEYS[0]] * 2
    assert bench.computed == [KEYS[0]]


def test_a_deleted_chunk_is_not_found_again_and_its_pages_come_back_with_the_last_request(bench: Bench) -> None:
    running, reading = bench.submit("a", "e", fresh=True), bench.submit("e", "b")
    bench.delete("a")
    assert all(bench.pool.find(KEYS[place]) is None for place in (0, 4)), "e was computed with sight of a"
    bench.read()
    bench.compute(running)
    assert reading.state == "ready", "it may still use what it holds"
    fresh = bench.submit("a")
    assert fresh.state == "loading"
    bench.compute(reading)
    bench.write()
    bench.write()
    assert running.state == reading.state == "finished"
    assert bench.pool.find(KEYS[4]) is None


def test_a_turn_stays_resident_only_if_nothing_that_it_has_seen_was_deleted(bench: Bench) -> None:
    turn = key("turn", 6, level=LEVEL_QUERY)
    for deleted in (False, True):
        request = bench.submit("a", reserved=9, fresh=True)
        bench.compute(request, 0)
        if deleted:
            bench.delete("a", "turn")
        bench.residency.adopt_turn(request, turn)
        assert (bench.pool.find(turn) is None) == deleted
        bench.end(request)
        bench.check()


def test_hits_and_misses_are_counted_once_per_request(bench: Bench) -> None:
    bench.store.kept = {KEYS[0]}
    request = bench.submit("a", "b", "a")
    bench.read()
    bench.residency.count(request)
    assert (bench.residency.hits["default"], bench.residency.misses["default"]) == (1, 1)


def test_an_overlay_is_computed_by_the_first_and_read_by_the_next(bench: Bench) -> None:
    overlay = OVERLAYS[1]
    bench.compute(bench.submit("b", fresh=True))
    bench.write()
    first, second, third = (bench.submit("b", scratch=2, overlay=2) for _ in range(3))
    for request in (second, first, third):
        bench.keep_overlay(request, overlay)
    assert (first.state, second.state, third.state) == ("loading",) * 3
    bench.read()
    assert (second.state, first.state, third.state) == ("ready", "loading", "loading"), "the first that wanted it"
    bench.residency.count(second)
    assert (bench.residency.hits["default"], bench.residency.misses["default"]) == (0, 1)
    bench.end(second)
    assert (first.state, third.state) == ("ready", "loading")
    bench.compute(first)
    assert third.state == "ready"
    bench.residency.count(third)
    assert (bench.residency.hits["default"], bench.residency.misses["default"]) == (1, 1)
    bench.compute(third)
    assert (first.state, third.state) == ("writing", "writing")
    bench.write()
    assert bench.store.written[-1] == overlay
    bench.pool.drop(bench.pool.find(overlay))  # type: ignore[arg-type]
    again = bench.submit("b", scratch=2, overlay=2)
    bench.keep_overlay(again, overlay)
    bench.read()
    assert again.state == "ready"
    assert bench.residency.to_compute(again) == []
    bench.compute(again)
    assert again.state == "finished"
    assert bench.computed.count(overlay) == 1


def test_an_overlay_that_can_not_be_written_is_left_out(bench: Bench) -> None:
    bench.compute(bench.submit("b", fresh=True))
    bench.write()
    request = bench.submit("b", scratch=2, overlay=2)
    bench.keep_overlay(request, OVERLAYS[0])
    bench.read()
    bench.compute(request)
    bench.store.write_fails = True
    bench.write()
    assert request.state == "finished"
    assert OVERLAYS[0] not in bench.store.kept
    bench.store.write_fails = False


def test_an_overlay_of_a_deleted_chunk_is_not_kept(bench: Bench) -> None:
    bench.compute(bench.submit("b", fresh=True))
    bench.write()
    request = bench.submit("b", scratch=2, overlay=2)
    bench.delete("b")
    bench.keep_overlay(request, OVERLAYS[1])
    assert request.state == "ready"
    assert bench.pool.find(OVERLAYS[1]) is None
    assert len(bench.residency[request].overlay_pages) == 1


def test_overlays_are_evicted_before_entries_that_were_used_earlier(bench: Bench) -> None:
    bench.compute(bench.submit("a", fresh=True))
    bench.write()
    request = bench.submit("a", scratch=2, overlay=2)
    bench.keep_overlay(request, OVERLAYS[0])
    bench.read()
    bench.compute(request)
    bench.write()
    assert bench.pool.room == 12, "a page for each of them"
    bench.end(bench.submit("d", reserved=10 * PAGE, fresh=True))
    assert bench.pool.find(KEYS[0])
    assert bench.pool.find(OVERLAYS[0]) is None


def test_entries_scattered_over_too_many_pages_come_back_side_by_side() -> None:
    """What is needed fills one page, and lies on three of four. So there would never be three for the answer."""
    bench = Bench(4, SHARED_PAGE, SMALL)
    bench.store.kept = set(SMALL)
    for chunk, *beside in ((SMALL[0], 64, 20), (SMALL[2], 64), (SMALL[5],)):
        made = bench.pool.place([chunk, *(key(f"{chunk.chunk_id}{tokens}", tokens) for tokens in beside)])
        bench.pool.kv[:, :, made[chunk].pages, :, made[chunk].places] = MARKS[chunk]
        bench.whole.add(made[chunk])
        for entry in made.values():
            entry.state, entry.stored = EntryState.READY, True
            bench.pool.unpin(entry)
    for entry in [entry for entry in bench.pool._entries.values() if entry not in bench.whole]:
        bench.pool.drop(entry)
    assert len({entry.page for entry in bench.whole}) == 3

    other = bench.submit("c", reserved=0)
    assert bench.submit("a", "c", "f", reserved=3 * SHARED_PAGE).state == "new", "c is where another request needs it"
    assert len(bench.pool._entries) == 3, "nothing is evicted in vain"
    request = bench.submit("a", "c", "f", reserved=2 * SHARED_PAGE)
    assert request.state == "loading"
    assert bench.residency[request].entries[1] is bench.residency[other].entries[0]
    bench.read()
    bench.compute(other)
    bench.compute(request)
    assert bench.store.read == [SMALL[0], SMALL[5]]

    assert bench.submit("a", "c", "f", reserved=3 * SHARED_PAGE).state == "ready", "they have come to where c is"
    bench.end(bench.live[0])
    bench.check_all_is_given_back()


# all of it at random


class Random(RuleBasedStateMachine):
    """Requests over six entries in memory for some of them; reads and writes fail and come late; chunks are deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = self.make()
        self.turns = 0

    def make(self) -> Bench:
        return Bench(pages=11)

    def in_state(self, state: str) -> list[Asked]:
        return [request for request in self.bench.live if request.state == state]

    @rule(
        chunks=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4),
        keep=st.booleans(),
        reserved=st.integers(0, 9),
        fresh=st.booleans(),
        repairs=st.booleans(),
    )
    def submit(self, chunks: list[str], keep: bool, reserved: int, fresh: bool, repairs: bool) -> None:
        page = self.bench.pool.page_size
        repaired, reserved = 6 * page // PAGE if repairs else 0, reserved * page // PAGE
        self.bench.submit(*chunks, keep=keep, reserved=reserved, fresh=fresh, scratch=repaired, overlay=repaired)

    def choosers(self) -> list[Asked]:
        """Requests whose entries are all there, and that have not chosen what they compute again."""
        ready, residency = self.in_state("ready"), self.bench.residency
        return [r for r in ready if r.overlay and not residency[r].kept and not residency.to_compute(r)]

    @precondition(lambda self: self.choosers())
    @rule(data=st.data(), overlay=st.sampled_from(OVERLAYS))
    def keep_overlay(self, data: st.DataObject, overlay: EntryKey) -> None:
        self.bench.keep_overlay(data.draw(st.sampled_from(self.choosers())), overlay)

    @precondition(lambda self: self.bench.readers.jobs)
    @rule(place=st.integers(0, 1), fails_after=st.none() | st.integers(0, 3))
    def read(self, place: int, fails_after: int | None) -> None:
        self.bench.store.read_fails_after = fails_after
        self.bench.readers.run(min(place, len(self.bench.readers.jobs) - 1))

    @precondition(lambda self: self.bench.writers.jobs)
    @rule(fails=st.booleans())
    def write(self, fails: bool) -> None:
        self.bench.store.write_fails = fails
        self.bench.writers.run()

    @precondition(lambda self: self.bench.posted)
    @rule(count=st.integers(1, 4))
    def deliver(self, count: int) -> None:
        self.bench.deliver(min(count, len(self.bench.posted)))

    @precondition(lambda self: self.in_state("ready"))
    @rule(data=st.data(), entries=st.integers(0, 3))
    def compute(self, data: st.DataObject, entries: int) -> None:
        self.bench.compute(data.draw(st.sampled_from(self.in_state("ready"))), entries)

    @precondition(lambda self: self.bench.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.bench.end(data.draw(st.sampled_from(self.bench.live)))

    @precondition(lambda self: self.in_state("writing") or self.in_state("ready"))
    @rule(data=st.data())
    def keep_turn(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.in_state("writing") + self.in_state("ready")))
        left = len(self.bench.residency[request].pages) * self.bench.pool.page_size
        if left:
            self.turns += 1
            tokens = data.draw(st.integers(1, left))
            seen = tuple(each.chunk_id for each in request.keys)
            self.bench.residency.adopt_turn(request, key(f"turn {self.turns}", tokens, seen, LEVEL_QUERY))  # type: ignore[arg-type]

    @rule(chunks=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=2))
    def delete(self, chunks: list[str]) -> None:
        self.bench.delete(*chunks)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.bench.check()

    def teardown(self) -> None:
        """Once all I/O is done and all that is ready computed, everybody has come to an end."""
        bench = self.bench
        bench.store.read_fails_after, bench.store.write_fails = None, False
        for _ in range(100):
            while bench.readers.jobs:
                bench.readers.run()
            while bench.writers.jobs:
                bench.writers.run()
            bench.deliver()
            for request in self.in_state("ready"):
                bench.compute(request)
                bench.check()
        assert not bench.live, "somebody waits for ever"
        bench.check_all_is_given_back()


class RandomSmall(Random):
    """Entries that share pages."""

    def make(self) -> Bench:
        return Bench(4, SHARED_PAGE, SMALL)


class RandomElsewhere(Random):
    """The same, read into memory of the host that then goes to the pool, as for a GPU."""

    def make(self) -> Bench:
        bench = Bench(4, SHARED_PAGE, SMALL, "elsewhere")
        bench.store.kept = set(SMALL)
        return bench


TestRandomSmall, TestRandomElsewhere = RandomSmall.TestCase, RandomElsewhere.TestCase
TestRandomElsewhere.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
TestRandomSmall.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
