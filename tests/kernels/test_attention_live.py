"""The tables of a running batch: what graphs compute from them after joins and leaves, and the host's book-keeping."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from braidsdk.kernels.attention.live import LivePlan
from braidsdk.kernels.attention.live_tables import LiveRoom, LiveTables, _Tile
from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, LIMIT = 16, 4096
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # as in test_attention.py
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


class Batch:
    """Paged memory, NaN wherever no entry's token lies, and requests that join and leave."""

    def __init__(
        self, slots: int, group: int, *, kv_heads: int = 1, head_dim: int = 16, dtype: torch.dtype = torch.float32
    ) -> None:
        self.random = random.Random(torch.initial_seed())
        pages = 256
        self.kv = torch.full((2, pages, kv_heads, PAGE, head_dim), float("nan"), dtype=dtype)
        self.free = torch.randperm(pages).tolist()
        self.group, self.scale = group, head_dim**-0.5
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.rotary = {d: RotaryTable(inv_freq, 1.0, d, DEVICE) for d in (torch.float32, torch.float64)}
        self.plan = LivePlan(slots=slots, group=group, kv_heads=kv_heads, page_size=PAGE, device=DEVICE, item_pages=3)
        self.positions = torch.full((slots,), 10**9, device=DEVICE)  # reading it for an empty slot is a fault
        self.running: dict[int, tuple[PagedSegment, ...]] = {}

    def entry(self, tokens: int, reserved: int = 0) -> torch.Tensor:
        """Pages of new tokens, and of some for which they are reserved."""
        pages = torch.tensor([self.free.pop() for _ in range(-(-max(tokens, reserved) // PAGE))])
        for index, page in enumerate(pages.tolist()):
            filled = max(0, min(PAGE, tokens - index * PAGE))
            self.kv[:, page, :, :filled] = torch.randn_like(self.kv[:, page, :, :filled])
        return pages

    def join(self, slot: int, entries: list[tuple[torch.Tensor, int]], own: int = 5, reserved: int = 16) -> None:
        """A request over entries and their tokens, one after another, and a tail of its own."""
        origin, segments = self.random.randrange(40), []
        for pages, tokens in entries:
            segments.append(PagedSegment(pages, 0, tokens, origin))
            origin += tokens
        segments.append(PagedSegment(self.entry(own, reserved), 0, reserved, origin))
        self.seat(slot, segments, origin + own - 1)

    def seat(self, slot: int, segments: list[PagedSegment], position: int) -> None:
        assert self.plan.join(slot, segments) is None
        self.running[slot] = tuple(segments)
        self.positions[slot] = position

    def leave(self, slot: int) -> None:
        self.plan.leave(slot)
        tail = self.running.pop(slot)[-1]
        self.kv[:, tail.pages] = float("nan")
        self.free += tail.pages.tolist()
        self.positions[slot] = 10**9

    def queries(self, rows: int) -> torch.Tensor:
        _, _, kv_heads, _, head_dim = self.kv.shape
        return torch.randn(rows, kv_heads * self.group, head_dim, dtype=self.kv.dtype, device=DEVICE)

    def compute(self, queries: torch.Tensor) -> torch.Tensor:
        """As a graph of so many rows does."""
        plan = self.plan.plan(self.positions[: len(queries)], *self.rotary[torch.float32].table(LIMIT))
        return plan.attend(queries, self.kv.to(DEVICE), self.scale)

    def check(self, *sizes: int) -> None:
        """Graphs of these rows give what the reference gives for each request, and zeros elsewhere."""
        self.plan.integrity()
        self.plan.upload()
        for rows in sizes:
            assert rows >= self.plan.rows
            queries = self.queries(rows)
            out = self.compute(queries)
            assert torch.equal(out, self.compute(queries)), "a replay gives the same bits"
            plans = [
                plan_request(
                    self.positions,
                    Request(slice(slot, slot + 1), segments),
                    self.rotary[torch.float64],
                    LIMIT,
                    PAGE,
                )
                for slot, segments in self.running.items()
                if segments
            ]
            clean = self.kv.to(DEVICE).double().nan_to_num(0.0)  # the reference wants it finite
            truth = cascade_attention_reference(queries.double(), plans, clean, self.scale)
            tolerance = TOLERANCE[self.kv.dtype]
            for row in range(rows):
                assert (out[row].double() - truth[row]).norm() <= tolerance * truth[row].norm(), row
                assert bool(out[row].any()) == bool(self.running.get(row)), row


@pytest.fixture
def new_batch(seed, poisoned) -> type[Batch]:
    return Batch


GEOMETRIES = [(1, 1, 64), (2, 2, 16), (1, 5, 16), (2, 7, 16), (1, 32, 16), (2, 2, 48)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), GEOMETRIES)
def test_rows_see_their_segments_and_slots_may_be_empty(new_batch, kv_heads, group, head_dim, dtype) -> None:
    batch = new_batch(8, group, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    shared = [(batch.entry(tokens), tokens) for tokens in (1, PAGE, 63, 150)]
    batch.join(1, shared)
    batch.join(2, [shared[3], shared[0], (batch.entry(17), 17)], own=1)
    batch.join(4, [shared[1]], own=40, reserved=100)
    batch.join(6, [], own=33, reserved=33)
    batch.check(8)


def test_slices_empty_segments_and_requests_without_any(new_batch) -> None:
    batch = new_batch(4, 2)
    pages, tokens = batch.entry(120), 120
    batch.seat(0, [PagedSegment(pages, 0, tokens, 0), PagedSegment(pages, 7, 7, 0)], 119)
    batch.seat(1, [PagedSegment(pages, 20, 90, 3), PagedSegment(batch.entry(9), 0, 9, 130)], 134)
    batch.seat(2, [PagedSegment(pages, 17, 96, 40)], 100)  # the same pages as before, other tokens of them
    batch.seat(3, [], 5)
    batch.check(4)


def test_a_request_may_use_an_entry_twice(new_batch) -> None:
    batch = new_batch(4, 2)
    first, second = ((batch.entry(tokens), tokens) for tokens in (70, 20))
    batch.join(0, [first, second, first])
    batch.join(2, [first, first, first, second])
    batch.join(3, [second, first])
    batch.check(4)
    batch.leave(2)
    batch.check(4)


def test_more_users_than_an_item_holds(new_batch) -> None:
    batch = new_batch(12, 8)  # an item holds 8 rows
    shared = (batch.entry(100), 100)
    for slot in range(11):
        batch.join(slot, [shared])
    batch.check(11, 12)
    for slot in (0, 9, 3):
        batch.leave(slot)
    batch.join(9, [shared])
    batch.check(12)


@pytest.mark.parametrize("group", [3, 4, 7])
def test_graphs_of_all_sizes_read_the_same_tables_after_joins_and_leaves(new_batch, group) -> None:
    batch = new_batch(8, group)
    entries = [(batch.entry(tokens), tokens) for tokens in (100, 64, 33, 5, 1)]
    for _ in range(5):
        for _ in range(5):
            slot = batch.random.randrange(8)
            if slot in batch.running:
                batch.leave(slot)
            else:
                batch.join(slot, batch.random.choices(entries[: batch.random.randint(1, 5)], k=3))
        batch.check(*(rows for rows in (2, 4, 8) if rows >= batch.plan.rows))
    for slot in sorted(batch.running, reverse=True):
        batch.leave(slot)
        batch.check(*(rows for rows in (2, 4) if rows >= batch.plan.rows))


def test_graphs_see_a_change_once_it_is_uploaded(new_batch, monkeypatch) -> None:
    batch = new_batch(4, 2)
    batch.join(0, [(batch.entry(50), 50)])
    batch.plan.upload()
    queries = batch.queries(4)
    before = batch.compute(queries)
    batch.join(1, [(batch.entry(50), 50)])
    assert torch.equal(batch.compute(queries), before)
    batch.plan.upload()
    after = batch.compute(queries)
    assert after[1].any()
    assert torch.equal(after[0], before[0])
    monkeypatch.setattr(torch.Tensor, "copy_", None)  # nothing has changed, so nothing is copied
    batch.plan.upload()


def test_growing_text_needs_no_upload(new_batch) -> None:
    batch = new_batch(2, 2)
    batch.join(1, [(batch.entry(50), 50)], own=60, reserved=60)
    for ahead in (40, 15, 0):
        batch.positions[1] -= ahead
        batch.check(2)
        batch.positions[1] += ahead


def changed(batch: Batch, entries: list[tuple[torch.Tensor, int]]) -> tuple[list[PagedSegment], int]:
    """Segments of entries with hidden keys, a shift, both or neither, and a tail; and the position of its last row."""
    slots, origin, segments = batch.entry(len(entries)), 0, []
    for at, (pages, tokens) in enumerate(entries):
        hidden = torch.rand(tokens) < 0.4 if batch.random.random() < 0.7 else None
        shift = int(slots[0]) * PAGE + at if batch.random.random() < 0.7 else None
        segments.append(PagedSegment(pages, 0, tokens, origin, hidden, shift))
        origin += tokens
    return [*segments, PagedSegment(batch.entry(5), 0, 5, origin)], origin + 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), GEOMETRIES[1:])
def test_rows_have_hidden_keys_and_shifts_of_their_own(new_batch, kv_heads, group, head_dim, dtype) -> None:
    batch = new_batch(8, group, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    shared = [(batch.entry(tokens), tokens) for tokens in (60, 7, 40)]
    batch.join(0, shared)
    batch.join(5, shared[::-1])
    for slot in (1, 3, 4):
        batch.seat(slot, *changed(batch, shared))
    batch.check(8)
    for slot in (4, 1, 0):
        batch.leave(slot)
    batch.seat(0, *changed(batch, shared))
    batch.check(4 + 2)


def test_after_a_request_with_hidden_keys_its_slot_has_none(new_batch) -> None:
    batch = new_batch(2, 2)
    shared = (batch.entry(100), 100)
    hides = PagedSegment(shared[0], 0, 100, 0, torch.rand(100) < 0.5, int(batch.entry(1)[0]) * PAGE)
    for _ in range(2):
        batch.join(0, [shared])
        batch.seat(1, [hides, PagedSegment(batch.entry(5), 0, 5, 100)], 104)
        assert batch.plan.changes
        batch.check(2)
        batch.leave(1)
        assert not batch.plan.changes
        batch.join(1, [shared])
        batch.check(2)
        for slot in (0, 1):
            batch.leave(slot)


@pytest.mark.gpu
def test_a_captured_graph_reads_what_was_uploaded_since(new_batch) -> None:
    batch = new_batch(8, 2, kv_heads=2, dtype=torch.bfloat16)
    entries = [(batch.entry(tokens), tokens) for tokens in (100, 64, 33, 5)]
    kv, queries = batch.kv.to(DEVICE), batch.queries(8)
    plan = batch.plan.plan(batch.positions, *batch.rotary[torch.float32].table(LIMIT))
    plan.attend(queries, kv, batch.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.attend(queries, kv, batch.scale)
    for slot in (3, 0, 7, 3, 5, 0):
        if slot in batch.running:
            batch.leave(slot)
        else:
            batch.join(slot, batch.random.sample(entries, 3))
        kv.copy_(batch.kv)
        batch.plan.upload()
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, batch.compute(queries))
        batch.check(8)


def test_a_graph_has_no_more_rows_than_there_are_slots(new_batch) -> None:
    with pytest.raises(ValueError, match="at most 4 rows"):
        new_batch(4, 2).plan.plan(torch.zeros(5, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1, 1))


def segment(pages: list[int], **changes: object) -> PagedSegment:
    return PagedSegment(torch.tensor(pages), 0, len(pages) * PAGE, 0, **changes)


def small_tables(slots: int = 4, **room: int) -> LiveTables:
    return LiveTables(
        slots=slots,
        most_rows=8,
        small_rows=2,
        page_size=PAGE,
        item_pages=2,
        room=LiveRoom(**{"items": 8, "words": 400, "partials": 4, **room}),
    )


def test_what_cannot_join_or_leave_is_refused() -> None:
    tables = small_tables()
    assert tables.join(1, [segment([5, 6])]) is None
    before = bytes(tables.host)
    for slot in (-1, 1, 4):
        with pytest.raises(ValueError, match="free slot below 4"):
            tables.join(slot, [segment([7])])
    with pytest.raises(ValueError, match="occupied slot, got 2"):
        tables.leave(2)
    tables.integrity()
    assert bytes(tables.host) == before


@pytest.mark.parametrize(("name", "size", "wanted"), [("items", 3, 8), ("words", 100, None), ("partials", 2, 6)])
def test_what_does_not_fit_says_how_much_room_it_wants(name, size, wanted) -> None:
    tables = small_tables(**{name: size})
    first, second = [segment([5, 6])], [segment([7, 8, 9]), segment([1])]
    assert tables.join(0, first) is None
    before = bytes(tables.host)
    room = tables.join(1, second)
    assert room is not None
    assert {other for other in vars(room) if getattr(room, other) != getattr(tables.room, other)} == {name}
    assert wanted in (None, getattr(room, name))
    assert bytes(tables.host) == before
    tables.integrity()
    larger = small_tables(**vars(room))
    assert larger.join(0, first) is None
    assert larger.join(1, second) is None
    larger.integrity()


def test_a_long_entry_takes_words_for_each_of_its_items() -> None:
    room = small_tables(items=40, words=300, partials=40).join(0, [segment(list(range(64)))])
    assert room == LiveRoom(40, 2 * (32 * 8 + 12 + 48), 40), "spans and pages, few members, and the most if need be"


def test_hidden_keys_take_words_too() -> None:
    tables, hides = small_tables(words=100), segment([5], hidden=torch.ones(PAGE, dtype=torch.bool))
    assert tables.join(0, [hides]) == LiveRoom(8, 2 * (8 + 12 + 48 + 64), 4)
    assert tables.join(0, [segment([5])]) is None


def _edit(at: Callable[[LiveTables], int], change: Callable[[int], int]) -> Callable[[LiveTables], None]:
    def edit(tables: LiveTables) -> None:
        tables.host[at(tables)] = change(tables.host[at(tables)])

    return edit


def _lose_a_block(tables: LiveTables) -> None:
    next(free for free in tables._heap._free.values() if free).pop()


def _free_a_block_twice(tables: LiveTables) -> None:
    free = next(free for free in tables._heap._free.values() if free)
    free.append(free[0])


def _change(tables: LiveTables) -> int:
    return tables.words_at + tables._running[0].changes[0]


def _word(at: Callable[[_Tile], int]) -> Callable[[LiveTables], int]:
    return lambda tables: tables.words_at + at(next(iter(tables._tiles.values()))[0])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_edit(lambda tables: 1, lambda large: large + 1), id="a large item more"),
        pytest.param(_edit(lambda tables: 2, lambda small: small + 1), id="a small item less"),
        pytest.param(_edit(lambda tables: 5, lambda count: count - 1), id="a partial result less"),
        pytest.param(_edit(lambda tables: 8, lambda first: first - 1), id="partial results elsewhere"),
        pytest.param(_edit(lambda tables: tables.items_at + 1, lambda count: count - 1), id="a row less"),
        pytest.param(_edit(lambda tables: tables.items_at + 4, lambda step: step + 1), id="another place"),
        pytest.param(_edit(_word(lambda tile: tile.spans[0] + 4), lambda page: page + 1), id="another page"),
        pytest.param(_edit(_word(lambda tile: tile.spans[0] + 1), lambda token: token + PAGE), id="other tokens"),
        pytest.param(_edit(_word(lambda tile: tile.frames), lambda origin: origin + 1), id="another position"),
        pytest.param(_edit(_word(lambda tile: tile.frames + 2), lambda stop: stop - 1), id="a token less"),
        pytest.param(_edit(lambda tables: tables.items_at + 5, lambda changed: changed + 1), id="a changed row more"),
        pytest.param(_edit(_change, lambda shift: shift + 1), id="another shift"),
        pytest.param(_edit(lambda tables: _change(tables) + 1, lambda bits: bits ^ 8), id="another key hidden"),
        pytest.param(_lose_a_block, id="a block lost"),
        pytest.param(_free_a_block_twice, id="a block freed twice"),
    ],
)
def test_integrity_notices(damage) -> None:
    tables = small_tables()
    for slot in range(3):  # more than two rows make large items
        changes = {"hidden": torch.rand(2 * PAGE) < 0.5, "shift": 7} if slot == 0 else {}
        assert tables.join(slot, [segment([5, 6], **changes), segment([10 + slot])]) is None
    tables.join(3, [segment([1])])
    tables.leave(3)
    tables.integrity()
    damage(tables)
    with pytest.raises(RuntimeError, match=r"slot|item|words"):
        tables.integrity()


def test_of_an_entrys_items_the_fullest_with_room_takes_who_joins() -> None:
    tables = small_tables(slots=12)
    for slot in range(11):
        assert tables.join(slot, [segment([5])]) is None
    for slot in range(6):
        tables.leave(slot)
    sizes = []
    for slot in range(3):
        sizes.append(sorted(len(tile.slots) for (tiles,) in [tables._tiles.values()] for tile in tiles))
        assert tables.join(slot, [segment([5])]) is None
    assert sizes == [[2, 3], [2, 4], [2, 5]], "so that the others run empty"


ENTRIES = [list(range(first, first + pages)) for first, pages in ((0, 1), (10, 2), (20, 3), (30, 7), (40, 9))]
CHOICES = st.lists(st.tuples(st.sampled_from(ENTRIES), st.booleans()), max_size=6)


class JoinsAndLeaves(RuleBasedStateMachine):
    """Tables in which not every request fits."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = {entry[0]: torch.tensor(entry) for entry in ENTRIES}
        self.running: set[int] = set()
        self.tails = 100

    @initialize(room=st.sampled_from([LiveRoom(16, 1500, 14), LiveRoom(60, 400, 14), LiveRoom(60, 1500, 14)]))
    def make(self, room: LiveRoom) -> None:
        self.tables = LiveTables(slots=12, most_rows=8, small_rows=2, page_size=PAGE, item_pages=2, room=room)

    @precondition(lambda self: len(self.running) < 12)
    @rule(data=st.data(), chosen=CHOICES)
    def join(self, data: st.DataObject, chosen: list[tuple[list[int], bool]]) -> None:
        slot = data.draw(st.sampled_from(sorted(set(range(12)) - self.running)))
        self.tails += 3
        segments = [PagedSegment(torch.arange(self.tails, self.tails + 3), 0, 2 * PAGE + 1, slot)]
        for entry, cut in chosen:
            whole = len(entry) * PAGE
            start, stop = (whole // 3, whole - 3) if cut else (0, whole)
            changes = {"hidden": torch.rand(stop) < 0.5, "shift": slot} if slot % 3 == 0 else {}
            segments.append(PagedSegment(self.tensors[entry[0]], start, stop, slot * 7 + len(segments), **changes))
        before = bytes(self.tables.host)
        wanted = self.tables.join(slot, segments)
        if wanted is None:
            self.running.add(slot)
        else:
            assert bytes(self.tables.host) == before
            assert any(getattr(wanted, name) > size for name, size in vars(self.tables.room).items())

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        self.tables.leave(slot)
        self.running.remove(slot)

    @invariant()
    def whole(self) -> None:
        self.tables.integrity()
        assert self.tables.rows == max(self.running, default=-1) + 1


JoinsAndLeaves.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestJoinsAndLeaves = JoinsAndLeaves.TestCase
