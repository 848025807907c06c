"""The attention in C against the float64 reference, in bfloat16."""

import random
from collections.abc import Callable

import pytest
import torch

from braidsdk.kernels import native
from braidsdk.kernels.attention.flash import flash_attention, plan_flash
from braidsdk.kernels.attention.native import NativePlan, plan_for_native
from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable

pytestmark = pytest.mark.usefixtures("level")

CPU = torch.device("cpu")
TOLERANCE = 6e-3
"""Relative, in the norm: rotated queries, weights and results are rounded once each, by 2 ** -9 at most."""


class Case:
    """Random paged memory, NaN wherever no entry's token lies, and requests over it."""

    def __init__(
        self, kv_heads: int, group: int, head_dim: int, page: int = 128, pages: int = 64, size: float = 1.0
    ) -> None:
        self.kv = torch.full((2, pages, kv_heads, page, head_dim), float("nan"), dtype=torch.bfloat16)
        self.group, self.page, self.size, self.scale = group, page, size, head_dim**-0.5
        self.free = torch.randperm(pages).tolist()
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.tables = {d: RotaryTable(inv_freq, 1.0, d, CPU) for d in (torch.float32, torch.float64)}
        self.requests: list[Request] = []
        self.positions: list[int] = []

    def entry(self, tokens: int) -> torch.Tensor:
        pages = torch.tensor([self.free.pop() for _ in range(max(1, -(-tokens // self.page)))])
        for index, page in enumerate(pages.tolist()):
            filled = min(self.page, tokens - index * self.page)
            self.kv[:, page, :, :filled] = torch.randn_like(self.kv[:, page, :, :filled])
            self.kv[0, page, :, :filled] *= self.size
        return pages

    def ask(self, segments: list[PagedSegment], positions: list[int]) -> None:
        start = len(self.positions)
        self.positions += positions
        self.requests.append(Request(slice(start, len(self.positions)), tuple(segments)))

    def plan(self, limit: int = 4096) -> NativePlan:
        return plan_for_native(
            torch.tensor(self.positions),
            self.requests,
            self.tables[torch.float32],
            limit=limit,
            page_size=self.page,
            group=self.group,
            kv_heads=self.kv.shape[2],
            dtype=torch.bfloat16,
        )

    def queries(self) -> torch.Tensor:
        q_heads, head_dim = self.kv.shape[2] * self.group, self.kv.shape[4]
        return torch.randn(len(self.positions), q_heads, head_dim, dtype=torch.bfloat16)

    def results(self, limit: int = 4096) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ours, torch's, and the truth."""
        queries = self.queries()
        ours = self.plan(limit).attend(queries, self.kv, self.scale)
        positions = torch.tensor(self.positions)
        plans = {
            dtype: [
                plan
                for each in self.requests
                if (plan := plan_request(positions, each, self.tables[dtype], limit, self.page))
            ]
            for dtype in self.tables
        }
        clean = self.kv.nan_to_num(0.0, 0.0, 0.0)  # they want what no row sees to be finite
        cut = [plan_flash(plan, torch.bfloat16, self.page, self.group) for plan in plans[torch.float32]]
        theirs = flash_attention(queries, cut, clean, self.scale)  # knows no shifts
        truth = cascade_attention_reference(queries.double(), plans[torch.float64], clean.double(), self.scale)
        return ours, theirs, truth

    def check(self, *, limit: int = 4096) -> None:
        ours, _, truth = self.results(limit)
        assert torch.isfinite(ours).all()
        assert (ours.double() - truth).norm() <= TOLERANCE * truth.norm()
        blind = (truth == 0).all(-1)  # sees no key; a single result of others may cancel to an exact 0 in float32
        assert torch.equal((ours == 0).all(-1), blind)


@pytest.fixture(autouse=True)
def _seeded(seed: int, poisoned: None) -> None:
    """A fresh seed, and results that hold NaN until they are written."""


GEOMETRIES = [(1, 1, 64), (2, 2, 128), (1, 8, 64), (2, 5, 96), (3, 3, 32), (1, 4, 128), (1, 7, 128)]


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("rows", [1, 2, 15, 33, 130])
def test_rows_over_ragged_segments(kv_heads: int, group: int, head_dim: int, rows: int) -> None:
    made = Case(kv_heads, group, head_dim)
    segments, origin = [], 0
    for tokens in (1, 31, 33, 127, 129, 300):
        segments.append(PagedSegment(made.entry(tokens), 0, tokens, origin))
        origin += tokens
    segments.append(PagedSegment(made.entry(rows), 0, rows + 50, origin))  # reserved further than it is filled
    made.ask(segments, list(range(origin, origin + rows)))
    made.check()


@pytest.mark.parametrize(("head_dim", "group"), [(16, 3), (80, 7), (112, 2)])
@pytest.mark.parametrize("rows", [1, 20])
def test_heads_that_are_no_whole_tiles(head_dim: int, group: int, rows: int, level: native.Level) -> None:
    made = Case(2, group, head_dim)
    made.ask([PagedSegment(made.entry(300), 0, 300, 0)], list(range(300 - rows, 300)))
    if level.name == "amx":
        with pytest.raises(ValueError, match="head_dim"):
            made.plan()
    else:
        made.check()


@pytest.mark.parametrize("page", [32, 64, 256])
def test_pages_of_other_sizes(page: int) -> None:
    made = Case(2, 2, 64, page)
    first, second = made.entry(300), made.entry(70)
    tail = PagedSegment(made.entry(40), 0, 60, 370)
    made.ask([PagedSegment(first, 0, 300, 0), PagedSegment(second, 0, 70, 300), tail], list(range(390, 407)))
    made.ask([PagedSegment(first, 33, 290, -33)], list(range(200, 300)))
    made.check()


def test_slices_hidden_keys_and_empty_segments() -> None:
    made = Case(1, 2, 64)
    pages, tokens = made.entry(400), 400
    hidden, everything = torch.rand(tokens) < 0.5, torch.ones(70, dtype=torch.bool)
    made.ask([PagedSegment(pages, 65, 390, -60)], [40])
    made.ask([PagedSegment(pages, 3, 66, 100, hidden), PagedSegment(pages, 5, 5, 0)], [150, 400])
    made.ask([PagedSegment(pages, 200, 333, 0, hidden[:333])], list(range(210, 310)))
    made.ask([PagedSegment(pages, 0, 70, 0, everything)], [90])
    made.ask([], [12])
    made.ask([PagedSegment(pages, 100, 120, 500)], [300])
    made.check()


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("rows", [1, 2, 9, 33, 130])
def test_shifted_segments(kv_heads: int, group: int, head_dim: int, rows: int) -> None:
    made = Case(kv_heads, group, head_dim)
    shifts = made.entry(50)  # slots among others, some of them NaN
    segments, origin = [], 0
    for place, tokens in enumerate((129, 40, 300, 7)):
        hidden = torch.rand(tokens) < 0.3 if place % 2 else None
        shift = None if place == 1 else int(shifts[0]) * made.page + 11 * place
        segments.append(PagedSegment(made.entry(tokens), 0, tokens, origin, hidden, shift))
        origin += tokens
    segments.append(PagedSegment(made.entry(rows), 0, rows, origin))
    made.ask(segments, list(range(origin, origin + rows)))
    made.check()
    plain = [PagedSegment(each.pages, each.start, each.stop, each.origin, each.hidden) for each in segments]
    queries = made.queries()
    shifted = made.plan().attend(queries, made.kv, made.scale)
    made.requests = [Request(slice(0, rows), tuple(plain))]
    unshifted = made.plan().attend(queries, made.kv, made.scale)
    assert (shifted.double() - unshifted.double()).norm() > 0.1 * shifted.double().norm()


@pytest.mark.parametrize("growth", [0.02, 0.1])
def test_a_shift_beside_scores_that_grow(growth: float) -> None:
    """What the weights are relative to moves within a shifted segment."""
    made = Case(1, 2, 64)
    pages, shift = made.entry(500), made.entry(1)
    for token in range(500):
        made.kv[0, pages[token // 128], :, token % 128] *= growth * token
    made.ask([PagedSegment(pages, 0, 500, 0, shift=int(shift[0]) * 128)], [499] * 20)
    made.ask([PagedSegment(pages, 0, 500, 0, shift=int(shift[0]) * 128)], [499])
    ours, _, truth = made.results()
    assert (ours.double() - truth).norm() <= 3 * TOLERANCE * truth.norm()


def test_what_is_hidden_or_outside_a_slice_may_be_anything() -> None:
    made = Case(2, 2, 128)
    pages = made.entry(256)
    hidden = torch.zeros(256, dtype=torch.bool)
    hidden[100:140:3] = True
    for token in [*range(100, 140, 3), *range(40), *range(250, 256)]:
        made.kv[:, pages[token // 128], :, token % 128] = random.choice((float("nan"), float("inf")))
    made.ask([PagedSegment(pages, 40, 250, 0, hidden)], [249, 251])
    made.check()


def test_rows_that_no_request_has_are_zero() -> None:
    made = Case(1, 2, 64)
    made.ask([PagedSegment(made.entry(40), 0, 40, 0)], [39, 40])
    made.positions += [7, 8]
    made.check()


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_as_close_to_the_truth_as_torchs_path(size: float, assert_as_good: Callable[..., None]) -> None:
    def results() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = Case(2, 2, 128, size=size)
        segments = [PagedSegment(made.entry(n), 0, n, at) for n, at in ((300, 0), (128, 300), (50, 428))]
        made.ask(segments, list(range(440, 478)))
        return made.results()

    assert_as_good(results)


def test_scores_that_grow_from_key_to_key(assert_as_good: Callable[..., None]) -> None:
    """What the weights are relative to moves again and again, also within a step."""

    def results() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = Case(1, 2, 64)
        pages = made.entry(500)
        for token in range(500):
            made.kv[0, pages[token // 128], :, token % 128] *= token / 10
        made.ask([PagedSegment(pages, 0, 500, 0)], [499] * 20)
        return made.results()

    assert_as_good(results, largest=1.2)  # a few keys have all the weight: less is averaged


@pytest.mark.parametrize("size", [1e4, 1e8, 1e12, 1e17])
def test_scores_beyond_reason_stay_finite(size: float) -> None:
    made = Case(2, 2, 128, size=size)
    made.ask([PagedSegment(made.entry(300), 0, 300, 0)], list(range(260, 300)))
    assert torch.isfinite(made.plan().attend(made.queries(), made.kv, made.scale)).all()


def test_a_score_far_below_zero_still_weighs() -> None:
    made = Case(1, 1, 64)
    entry = made.entry(1)
    made.ask([PagedSegment(entry, 0, 1, 0)], [0])
    made.kv[0, entry[0], 0, 0] = -1e18
    queries = torch.full((1, 1, 64), 1e18, dtype=torch.bfloat16)
    found = made.plan().attend(queries, made.kv, made.scale)
    assert torch.equal(found[0, 0], made.kv[1, entry[0], 0, 0])


def test_the_default_dtype_of_torch_does_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = Case(2, 2, 128)
        made.ask([PagedSegment(made.entry(300), 0, 300, 0)], list(range(260, 300)))
        angles = made.plan().kept[3]
    finally:
        torch.set_default_dtype(torch.float32)
    assert angles.dtype == torch.float32


@pytest.mark.parametrize("page_size", [48, 160, 192])
def test_pages_that_are_no_whole_steps_are_refused(page_size: int) -> None:
    made = Case(1, 1, 64)
    with pytest.raises(ValueError, match="a multiple of 128"):
        plan_for_native(
            torch.zeros(1, dtype=torch.int64),
            [],
            made.tables[torch.float32],
            limit=8,
            page_size=page_size,
            group=1,
            kv_heads=1,
            dtype=torch.bfloat16,
        )


def test_high_positions() -> None:
    made = Case(1, 1, 64)
    made.ask([PagedSegment(made.entry(64), 0, 64, 0), PagedSegment(made.entry(64), 0, 64, 131_000)], [131_040, 131_072])
    made.check(limit=131_073)


@pytest.mark.parametrize("requests", [1, 7, 30])
def test_random_batches(requests: int) -> None:
    """Any subsets in any order, slices, gaps and hidden keys."""
    made = Case(2, 2, 128, pages=200)
    state = random.Random(torch.initial_seed())
    entries = [(made.entry(n), n) for n in (1, 15, 17, 63, 65, 500, 1000) for _ in range(2)]
    for _ in range(requests):
        chosen, origin = [], state.randint(0, 1000)
        for pages, tokens in state.choices(entries, k=9):
            start = state.choice((0, 0, state.randrange(tokens)))
            hidden = torch.rand(tokens) < 0.3 if state.random() < 0.2 else None
            chosen.append(PagedSegment(pages, start, tokens, origin - start, hidden))
            origin += tokens - start + state.choice((0, 0, 11))
        rows = state.randint(1, 20)
        chosen.append(PagedSegment(made.entry(70), 0, 70, origin))
        made.ask(chosen, list(range(origin + 30, origin + 30 + rows)))
    made.check(limit=131_072)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    made = Case(2, 2, 128)
    made.ask([PagedSegment(made.entry(300), 0, 300, 0)], list(range(100, 300)))
    made.ask([PagedSegment(made.entry(40), 0, 40, 0)], [39])
    queries, plan, found = made.queries(), made.plan(), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(plan.attend(queries, made.kv, made.scale))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_arguments_that_do_not_fit_are_refused() -> None:
    made = Case(2, 2, 64)
    pages = made.entry(100)
    made.ask([PagedSegment(pages, 0, 100, 0)], [99])
    plan, queries = made.plan(), made.queries()
    with pytest.raises(ValueError, match=r"expected queries of shape \[1, 4, 64\]"):
        plan.attend(queries[:, :2], made.kv, made.scale)
    with pytest.raises(ValueError, match="bfloat16"):
        plan.attend(queries.float(), made.kv, made.scale)
    with pytest.raises(ValueError, match="strides"):
        plan.attend(queries.transpose(1, 2).contiguous().transpose(1, 2), made.kv, made.scale)
    with pytest.raises(ValueError, match="pages of the memory"):
        plan.attend(queries, made.kv[:, : int(pages[0])].contiguous(), made.scale)
    with pytest.raises(ValueError, match="expected 2 int64 page ids"):
        Case.plan(_with(made, PagedSegment(pages, 0, 129, 0)))
    with pytest.raises(ValueError, match="negative page id"):
        Case.plan(_with(made, PagedSegment(-pages - 1, 0, 100, 0)))
    with pytest.raises(ValueError, match="not below 4096"):
        Case.plan(_with(made, PagedSegment(pages, 0, 100, -5000)))
    beyond = _with(made, PagedSegment(pages, 0, 100, 0))
    beyond.requests = [Request(slice(0, 2), beyond.requests[0].segments)]
    with pytest.raises(ValueError, match="rows among 1 tokens"):
        beyond.plan()
    with pytest.raises(ValueError, match="multiple of 128"):
        Case(1, 1, 64, page=48).plan()


def _with(made: Case, segment: PagedSegment) -> Case:
    made.requests, made.positions = [], []
    made.ask([segment], [99])
    return made
