"""Attention of questions in captured graphs: one table after another in the same memory."""

import random
from dataclasses import replace

import pytest
import torch

from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.attention.reference import cascade_attention_reference
from braidsdk.kernels.attention.static import Room, StaticPlan
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, LIMIT, ROWS = 16, 2048, 12


class Questions:
    """Paged memory with NaN wherever no token lies, and a plan that takes questions over its entries."""

    def __init__(self, group: int, room: Room | None = None, rows: int = ROWS, *, changes: bool = True) -> None:
        self.random = random.Random(torch.initial_seed())
        self.kv = torch.full((2, 128, 2, PAGE, 16), float("nan"))
        self.free, self.group = torch.randperm(128).tolist(), group
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16))
        self.rotary = {d: RotaryTable(inv_freq, 1.0, d, DEVICE) for d in (torch.float32, torch.float64)}
        self.positions = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        cos, sin = self.rotary[torch.float32].table(LIMIT)
        self.plan = StaticPlan(
            rows=rows,
            positions=self.positions,
            cos=cos,
            sin=sin,
            group=group,
            kv_heads=2,
            page_size=PAGE,
            room=room or Room(),
            changes=changes,
        )

    def entry(self, tokens: int) -> torch.Tensor:
        pages = torch.tensor([self.free.pop() for _ in range(-(-tokens // PAGE))])
        for index, page in enumerate(pages.tolist()):
            filled = min(PAGE, tokens - index * PAGE)
            self.kv[:, page, :, :filled] = torch.randn_like(self.kv[:, page, :, :filled])
        return pages

    def ask(self, *questions: tuple[int, list[tuple[torch.Tensor, int]]]) -> list[Request]:
        """Questions of so many tokens each, over entries and their tokens."""
        requests, row = [], 0
        for tokens, entries in questions:
            origin, segments = self.random.randrange(40), []
            for pages, seen in entries:
                segments.append(PagedSegment(pages, 0, seen, origin))
                origin += seen
            segments.append(PagedSegment(self.entry(tokens), 0, tokens, origin))
            requests.append(Request(slice(row, row + tokens), tuple(segments)))
            self.positions[row : row + tokens] = torch.arange(origin, origin + tokens)
            row += tokens
        return requests

    def check(self, requests: list[Request]) -> None:
        """A replay gives each question what the reference gives, and other rows zeros."""
        assert self.plan.load(requests) is None
        queries = torch.randn(len(self.positions), 2 * self.group, 16, device=DEVICE)
        out = self.plan.plan.attend(queries, self.kv.to(DEVICE), 0.25)
        plans = [plan_request(self.positions, each, self.rotary[torch.float64], LIMIT, PAGE) for each in requests]
        clean = self.kv.to(DEVICE).double().nan_to_num(0.0)
        truth = cascade_attention_reference(queries.double(), [plan for plan in plans if plan], clean, 0.25)
        for row in range(len(queries)):
            assert (out[row].double() - truth[row]).norm() <= 3e-6 * truth[row].norm(), row
        asked = max(request.rows.stop for request in requests)
        assert not out[asked:].any()


@pytest.mark.parametrize("group", [1, 2, 5, 7, 8])  # with 8 an item holds 8 of the 12 rows
def test_each_question_sees_its_own_segments(group: int, seed: int, poisoned: None) -> None:
    asking = Questions(group)
    shared = [(asking.entry(tokens), tokens) for tokens in (1, PAGE, 63, 150, 17)]
    asking.check(asking.ask((ROWS, shared)))
    asking.check(asking.ask((3, shared), (1, [shared[3], shared[0]]), (5, [])))
    asking.check(asking.ask((1, [shared[2], shared[2]]), (4, shared[::-1])))


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("group", [2, 7])
def test_keys_are_hidden_and_shifted_for_one_question_and_not_for_the_next(
    group: int, rows: int, seed: int, poisoned: None
) -> None:
    asking = Questions(group, rows=rows)
    shared = [(asking.entry(tokens), tokens) for tokens in (1, 63, 150, 40)]
    slots = [int(asking.entry(13)[0]) * PAGE + at for at in (3, 12)]
    plain = asking.ask((1, shared), *[(4, shared[1:])] * (rows > 1))
    changed = []
    for at, request in enumerate(plain):
        one, *_, two, three, own = request.segments
        hidden = torch.rand(150) < 0.4
        segments = (replace(one, shift=slots[at]), replace(two, hidden=hidden), replace(three, shift=slots[1]), own)
        changed.append(Request(request.rows, segments))
    for requests in (plain, changed, [plain[0], *changed[1:]], plain):
        asking.check(requests)


def test_pages_of_hidden_keys_are_not_read(seed: int, poisoned: None) -> None:
    asking = Questions(2)
    shared = [(asking.entry(tokens), tokens) for tokens in (40, 150, 9)]
    (plain,) = asking.ask((5, shared))
    hidden = torch.zeros(150, dtype=torch.bool)
    hidden[PAGE + 3 : 5 * PAGE] = hidden[-(150 % PAGE) :] = True
    first, second, third, own = plain.segments
    unread = second.pages[torch.tensor([2, 3, 4, 150 // PAGE])]
    asking.kv[:, unread] = float("nan")
    all_hidden = replace(third, hidden=torch.ones(9, dtype=torch.bool))
    asking.check([Request(plain.rows, (first, replace(second, hidden=hidden), all_hidden, own))])


def test_a_plan_of_unchanged_keys_takes_no_others(seed: int, poisoned: None) -> None:
    asking = Questions(2, changes=False)
    shared = [(asking.entry(tokens), tokens) for tokens in (40, 100)]
    (plain,) = asking.ask((3, shared))
    asking.check([plain])
    one, two, own = plain.segments
    for changed in (replace(one, shift=PAGE), replace(one, hidden=torch.zeros(40, dtype=torch.bool))):
        with pytest.raises(ValueError, match="changes=True"):
            asking.plan.load([Request(plain.rows, (changed, two, own))])


def test_a_request_without_rows_takes_no_part(seed: int, poisoned: None) -> None:
    asking = Questions(2)
    shared = [(asking.entry(tokens), tokens) for tokens in (40, 100)]
    requests = asking.ask((3, shared), (2, shared[:1]))
    asking.check([Request(slice(0, 0), requests[0].segments), *requests])


@pytest.mark.parametrize("group", [2, 7])
def test_one_row_is_merged_by_its_last_program(group: int, seed: int, poisoned: None) -> None:
    asking = Questions(group, rows=1)
    shared = [(asking.entry(tokens), tokens) for tokens in (100, 7, 300)]
    for entries in (shared, shared[:1], []):
        asking.check(asking.ask((1, entries)))


def test_tables_that_are_too_small_say_what_they_need(seed: int, poisoned: None) -> None:
    asking = Questions(2, Room(items=512, words=40, partials=4096))
    entries = [(asking.entry(60), 60) for _ in range(6)]
    small, large = asking.ask((2, entries[:1])), asking.ask((2, entries))
    room = asking.plan.load(large)
    assert room
    assert room.words > 40
    assert (room.items, room.partials) == (512, 4096), "what was large enough stays as it is"
    assert asking.plan.load(small) is None
    asking.plan = Questions(2, room).plan
    assert asking.plan.load(large) is None
