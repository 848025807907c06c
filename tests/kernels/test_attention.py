"""The attention kernel against the float64 reference: in the interpreter, or on a GPU where there is one."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from braidsdk.kernels.attention import launch
from braidsdk.kernels.attention.launch import TritonPlan, plan_for_triton
from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 64
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


class Case:
    """Random paged memory, NaN wherever no entry's token lies, and requests over it."""

    def __init__(self, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, pages: int = 96) -> None:
        self.kv = torch.full((2, pages, kv_heads, PAGE, head_dim), float("nan"), dtype=dtype)
        self.group, self.scale = group, head_dim**-0.5
        self.free = torch.randperm(pages).tolist()
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.tables = {d: RotaryTable(inv_freq, 1.0, d, DEVICE) for d in (torch.float32, torch.float64)}
        self.requests: list[Request] = []
        self.positions: list[int] = []

    def entry(self, tokens: int) -> torch.Tensor:
        pages = torch.tensor([self.free.pop() for _ in range(max(1, -(-tokens // PAGE)))])
        for index, page in enumerate(pages.tolist()):
            filled = min(PAGE, tokens - index * PAGE)
            self.kv[:, page, :, :filled] = torch.randn_like(self.kv[:, page, :, :filled])
        return pages

    def ask(self, segments: list[PagedSegment], positions: list[int]) -> None:
        start = len(self.positions)
        self.positions += positions
        self.requests.append(Request(slice(start, len(self.positions)), tuple(segments)))

    def plan(self, limit: int = 4096) -> TritonPlan:
        return plan_for_triton(
            torch.tensor(self.positions),
            self.requests,
            self.tables[torch.float32],
            limit=limit,
            page_size=PAGE,
            group=self.group,
            kv_heads=self.kv.shape[2],
            dtype=self.kv.dtype,
        )

    def check(self, *, limit: int = 4096) -> None:
        kv_heads, head_dim = self.kv.shape[2], self.kv.shape[4]
        rows = len(self.positions)
        queries = torch.randn(rows, kv_heads * self.group, head_dim, dtype=self.kv.dtype)
        positions, plan = torch.tensor(self.positions), self.plan(limit)
        kv, queries = self.kv.to(DEVICE), queries.to(DEVICE)
        for _ in range(2):  # a second launch finds its counters as the first did
            out = plan.attend(queries, kv, self.scale)
        again = plan.attend(queries, kv, self.scale)
        assert torch.equal(out, again)
        plans = [
            made
            for each in self.requests
            if (made := plan_request(positions.to(DEVICE), each, self.tables[torch.float64], limit, PAGE))
        ]
        clean = kv.double().nan_to_num(0.0)  # the reference wants what no row sees to be finite
        truth = cascade_attention_reference(queries.double(), plans, clean, self.scale)
        assert torch.isfinite(out).all()
        assert (out.double() - truth).norm() <= TOLERANCE[self.kv.dtype] * truth.norm() + 1e-30
        seen = {row for each in self.requests if each.segments for row in range(each.rows.start, each.rows.stop)}
        for row in set(range(rows)) - seen:
            assert not out[row].any()


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Callable[..., Case]:
    torch.manual_seed(torch.seed() % 2**31)
    return Case


GEOMETRIES = [(1, 1, 64), (2, 2, 128), (1, 8, 64), (2, 5, 64), (2, 7, 64), (1, 2, 80), (1, 3, 96)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), GEOMETRIES)
def test_one_row_over_ragged_segments(case, kv_heads, group, head_dim, dtype) -> None:
    made = case(kv_heads, group, head_dim, dtype)
    segments, origin = [], 0
    for tokens in (1, 15, 17, 63, 65, 130):
        segments.append(PagedSegment(made.entry(tokens), 0, tokens, origin))
        origin += tokens
    made.ask(segments, [origin - 1])
    made.check()


def test_more_query_heads_than_a_product_has_rows_are_refused(case) -> None:
    made = case(1, 65, 64, torch.float32)
    made.ask([PagedSegment(made.entry(9), 0, 9, 0)], [8])
    with pytest.raises(ValueError, match="at most 64 query heads per KV head, got 65"):
        made.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(2, 64), (7, 64), (2, 80)])
def test_rows_of_a_question_see_their_past_only(case, group, head_dim, dtype) -> None:
    made = case(2, group, head_dim, dtype)
    first, second = made.entry(100), made.entry(70)
    tail = PagedSegment(made.entry(40), 0, 60, 170)  # reserved further than it is filled
    made.ask([PagedSegment(first, 0, 100, 0), PagedSegment(second, 0, 70, 100), tail], list(range(190, 207)))
    made.check()


def test_requests_share_pages_at_different_positions(case) -> None:
    made = case(2, 2, 64, torch.float32)
    entries = [(made.entry(n), n) for n in (130, 64, 37)]
    for order in ([0, 1, 2], [2, 0], [1], [2, 1, 0, 2]):
        origin, segments = 7, []
        for index in order:
            pages, tokens = entries[index]
            segments.append(PagedSegment(pages, 0, tokens, origin))
            origin += tokens
        segments.append(PagedSegment(made.entry(5), 0, 5, origin))
        made.ask(segments, [origin + 3, origin + 4])
    made.check()


def test_slices_hidden_keys_and_empty_segments(case) -> None:
    made = case(1, 2, 64, torch.float32)
    pages, tokens = made.entry(200), 200
    hidden = torch.rand(tokens) < 0.5
    everything = torch.ones(70, dtype=torch.bool)
    made.ask([PagedSegment(pages, 65, 190, -60)], [40])
    made.ask([PagedSegment(pages, 3, 66, 100, hidden), PagedSegment(pages, 5, 5, 0)], [150, 400])
    made.ask([PagedSegment(pages, 0, 70, 0, everything)], [90])
    made.ask([], [12])
    made.ask([PagedSegment(pages, 100, 120, 500)], [300])
    made.check()


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [*((2, 64, dtype) for dtype in DTYPES), (7, 64, torch.float32), (2, 96, torch.float32)],
    ids=str,
)
def test_many_rows(case, group, head_dim, dtype) -> None:
    made = case(1, group, head_dim, dtype)
    anchor = PagedSegment(made.entry(40), 0, 40, 0)
    for tokens in (150, 70, 60):
        own = made.entry(tokens)
        made.ask([anchor, PagedSegment(own, 0, tokens, 40)], list(range(40, 40 + tokens)))
    hidden = torch.rand(70) < 0.3
    made.ask([PagedSegment(made.entry(70), 2, 70, 10, hidden)], [5, 50, 90])
    gone = torch.arange(300) // PAGE % 2 == 1  # every other page
    unread = made.entry(300)
    made.kv[:, unread[1::2]] = float("nan")
    made.ask([PagedSegment(unread, 5, 300, 0, gone)], [20, 70, 400])
    made.ask([], [1])
    made.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("rows", [1, 9])
def test_shifted_segments(case, kv_heads, group, head_dim, rows, dtype) -> None:
    made = case(kv_heads, group, head_dim, dtype)
    segments, origin = shifted(made, (129, 40, 200, 7))
    segments.append(PagedSegment(made.entry(rows), 0, rows, origin))
    made.ask(segments, list(range(origin, origin + rows)))
    assert made.plan().launch.shared
    made.check()


def shifted(made: Case, lengths: Sequence[int]) -> tuple[list[PagedSegment], int]:
    """Segments of new entries, one behind the other, all but the second with a shift, each other one with hidden keys;
    and where they end."""
    slots = made.entry(34)  # what lies behind the last one is NaN
    segments, origin = [], 0
    for place, tokens in enumerate(lengths):
        hidden = torch.rand(tokens) < 0.3 if place % 2 else None
        shift = None if place == 1 else int(slots[0]) * PAGE + 11 * place
        segments.append(PagedSegment(made.entry(tokens), 0, tokens, origin, hidden, shift))
        origin += tokens
    return segments, origin


@pytest.mark.parametrize(("group", "dtype"), [*((2, dtype) for dtype in DTYPES), (7, torch.float32)], ids=str)
def test_rows_of_an_item_have_shifts_and_hidden_keys_of_their_own(case, group, dtype) -> None:
    made = case(1, group, 64, dtype)
    segments, origin = shifted(made, (100, 64, 37))
    for place in range(5):
        slots = made.entry(20)
        own = [
            replace(
                each,
                hidden=None if at == place else torch.rand(each.stop) < 0.4,
                shift=None if (at + place) % 3 == 0 else int(slots[0]) * PAGE + at,
            )
            for at, each in enumerate(segments)
        ]
        made.ask(own if place < 4 else [replace(each, hidden=None, shift=None) for each in own], [origin - place])
    assert not made.plan().launch.shared
    made.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_over_shifted_segments(case, dtype, monkeypatch) -> None:
    monkeypatch.setattr(launch, "MANY_ROWS", 60)
    made = case(2, 2, 64, dtype)
    segments, origin = shifted(made, (70, 30, 64))
    made.ask([*segments, PagedSegment(made.entry(50), 0, 50, origin)], list(range(origin, origin + 50)))
    made.ask([PagedSegment(made.entry(20), 0, 20, 0)], list(range(20)))
    assert made.plan().launch.direct
    made.check()


@pytest.mark.parametrize("growth", [0.02, 0.1])
def test_a_shift_beside_scores_that_grow(case, growth: float) -> None:
    """What the weights are relative to moves within a shifted segment, and from one to the next."""
    made = case(1, 2, 64, torch.float32)
    slots = made.entry(60)
    segments = []
    for place in range(3):
        pages = made.entry(200)
        for token in range(200):
            made.kv[0, pages[token // PAGE], :, token % PAGE] *= growth * token
        segments.append(PagedSegment(pages, 0, 200, 200 * place, shift=int(slots[0]) * PAGE + place))
    made.ask(segments, [599, 300])
    made.check()


def test_segments_without_changes_compile_to_what_they_did(case) -> None:
    """No flag is set for them, so nothing is loaded."""
    made = case(1, 2, 64, torch.float32)
    made.ask([PagedSegment(made.entry(40), 0, 40, 0)], [39])
    assert (made.plan().launch.hides, made.plan().launch.shifts) == (False, False)


def test_high_positions(case) -> None:
    made = case(1, 1, 64, torch.float32)
    made.ask([PagedSegment(made.entry(64), 0, 64, 0), PagedSegment(made.entry(64), 0, 64, 131_000)], [131_040, 131_072])
    made.check(limit=131_073)


@pytest.mark.parametrize("group", [2, 7])
def test_small_requests_share_an_item(case, group) -> None:
    made = case(1, group, 64, torch.float32)
    shared = [(made.entry(64), 64) for _ in range(6)]
    for index in range(9):
        order = torch.randperm(6).tolist()
        segments = [PagedSegment(shared[i][0], 0, 64, 64 * place) for place, i in enumerate(order)]
        own = 1 + 7 * index
        segments.append(PagedSegment(made.entry(own), 0, own, 384))
        made.ask(segments, [384 + own - 1])
    made.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("requests", "segments"), [(1, 100), (7, 30), (64, 9)])
def test_random_batches(case, requests, segments, dtype) -> None:
    """Any subsets in any order, slices, gaps and hidden keys; a few rows each."""
    made = case(4, 2, 128, dtype, pages=1200)
    state = random.Random(torch.initial_seed())
    entries = [(made.entry(n), n) for n in (1, 15, 17, 63, 65, 500, 4097) for _ in range(3)]
    for _ in range(requests):
        chosen, origin = [], state.randint(0, 1000)
        for pages, tokens in state.choices(entries, k=segments):
            start = state.choice((0, 0, state.randrange(tokens)))
            hidden = torch.rand(tokens) < 0.3 if state.random() < 0.1 else None
            chosen.append(PagedSegment(pages, start, tokens, origin - start, hidden))
            origin += tokens - start + state.choice((0, 0, 11))
        rows = state.randint(1, 3)
        chosen.append(PagedSegment(made.entry(70), 0, 70, origin))
        made.ask(chosen, list(range(origin + 30, origin + 30 + rows)))
    made.check(limit=131_072 * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 300])
def test_memory_past_two_billion_elements(case, rows) -> None:
    """High page ids give the bits that low ones do."""
    made = case(8, 2, 128, torch.bfloat16, pages=16)
    entry, tail = made.entry(500), made.entry(rows)
    low = made.kv.to(DEVICE)
    pages = 2**31 // (8 * PAGE * 128)  # keys alone are 2**31 elements
    high = torch.empty(2, pages, 8, PAGE, 128, dtype=torch.bfloat16, device=DEVICE)
    high[:, -16:] = low
    queries = torch.randn(rows, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    positions = torch.arange(500, 500 + rows)
    found = []
    for memory, shift in ((low, 0), (high, pages - 16)):
        segments = (PagedSegment(entry + shift, 0, 500, 0), PagedSegment(tail + shift, 0, rows, 500))
        plan = plan_for_triton(
            positions,
            [Request(slice(0, rows), segments)],
            made.tables[torch.float32],
            limit=1024,
            page_size=PAGE,
            group=2,
            kv_heads=8,
        )
        found.append(plan.attend(queries, memory, made.scale))
    assert high.numel() > 2**32 - 2**20
    assert torch.equal(*found)
    assert torch.isfinite(found[0]).all()
