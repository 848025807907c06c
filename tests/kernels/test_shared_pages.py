"""Entries that share a page: attention gives what it gives over pages of their own, whatever lies beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.attention import cascade_attention, cascade_attention_lse, plan_attention
from braidsdk.kernels.attention.live import LivePlan
from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.attention.reference import cascade_attention_lse_reference, cascade_attention_reference
from braidsdk.kernels.attention.static import Room, StaticPlan
from braidsdk.kernels.backends import Backend
from braidsdk.kernels.key_weights import plan_key_weights, weights_by_segment
from braidsdk.kernels.key_weights.reference import largest_weights_reference
from braidsdk.kernels.paging import BLOCK, PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable

KV_HEADS, GROUP, LIMIT = 2, 3, 4096
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # as in test_attention.py


@dataclass
class Memory:
    """Paged memory, NaN wherever no entry's token lies, and zero behind the last token in an entry's last block."""

    kv: Tensor
    free: int = 0

    def put(self, keys: Tensor, at: tuple[int, int] | None) -> tuple[Tensor, int]:
        """Lay an entry, [2, kv_heads, tokens, head_dim], on a page with an offset, or on pages of its own."""
        size, tokens = self.kv.shape[3], keys.shape[2]
        if at is None:
            at, self.free = (self.free, 0), self.free + -(-tokens // size)
        pages = torch.arange(at[0], at[0] + -(-(at[1] + tokens) // size))
        taken = -(-tokens // BLOCK) * BLOCK
        padded = torch.nn.functional.pad(keys, (0, 0, 0, taken - tokens))
        for place in range(at[1], at[1] + taken):
            self.kv[:, pages[place // size], :, place % size] = padded[:, :, place - at[1]]
        return pages, at[1]


class Both:
    """The same entries on pages of their own, and on pages that they share; a request over both."""

    def __init__(self, page: int, head_dim: int, dtype: torch.dtype, places: Sequence[tuple[int, int, int]]) -> None:
        """`places`: of each entry its tokens, its page, and its offset there."""
        self.page, self.dtype, self.scale = page, dtype, head_dim**-0.5
        empty = torch.full((2, 40, KV_HEADS, page, head_dim), float("nan"), dtype=dtype)
        self.memories = (Memory(empty.clone()), Memory(empty.clone(), free=20))  # what is shared lies before that
        self.segments: tuple[list[PagedSegment], ...] = ([], [])
        self.end = 0
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        cpu = torch.device("cpu")
        self.rotary = {d: RotaryTable(inv_freq, 1.0, d, cpu) for d in (torch.float32, torch.float64)}
        self.slot = [self.add_slot(at) for at in range(2)]
        for tokens, first, offset in places:
            self.add(tokens, (first + 10, offset))

    def add_slot(self, memory: int) -> int:
        """A key and a value to shift others by."""
        torch.manual_seed(5)
        keys = torch.randn(2, KV_HEADS, 9, self.memories[0].kv.shape[4], dtype=self.dtype)
        pages, _ = self.memories[memory].put(keys, (39, 0))
        return int(pages[0]) * self.page + 4

    def add(self, tokens: int, at: tuple[int, int] | None, reserved: int = 0) -> None:
        """An entry behind those before it; without a place it has pages of its own in both memories."""
        keys = torch.randn(2, KV_HEADS, tokens, self.memories[0].kv.shape[4], dtype=self.dtype)
        for memory, segments, shared in zip(self.memories, self.segments, (False, True), strict=True):
            pages, offset = memory.put(keys, at if shared else None)
            stop = offset + max(tokens, reserved)
            segments.append(PagedSegment(pages, offset, stop, self.end, offset=offset))
        self.end += tokens

    def change(self, place: int, hides: Tensor | None = None, cut: tuple[int, int] = (0, 0), *, shifts: bool) -> None:
        """Hide keys of an entry, cut a slice out of it, and shift it."""
        for at, segments in enumerate(self.segments):
            old = segments[place]
            segments[place] = replace(
                old,
                start=old.start + cut[0],
                stop=old.stop - cut[1],
                hidden=None if hides is None else torch.nn.functional.pad(hides, (old.offset, 0)),
                shift=self.slot[at] if shifts else None,
            )

    def requests(self, rows: int) -> list[list[Request]]:
        return [[Request(slice(0, rows), tuple(segments))] for segments in self.segments]

    def shape(self) -> dict[str, int]:
        return {"limit": LIMIT, "page_size": self.page, "group": GROUP, "kv_heads": KV_HEADS}

    def queries(self, rows: int) -> Tensor:
        return torch.randn(rows, KV_HEADS * GROUP, self.memories[0].kv.shape[4], dtype=self.dtype)

    def attend(self, positions: list[int], backend: Backend, *, by_segment: bool = False) -> list[tuple[Tensor, ...]]:
        """What a backend gives over both memories, and what the reference does over the shared pages."""
        queries, at = self.queries(len(positions)), torch.tensor(positions)
        found = []
        for memory, requests in zip(self.memories, self.requests(len(positions)), strict=True):
            plan = plan_attention(
                at, requests, self.rotary[torch.float32], dtype=self.dtype, backend=backend, by_segment=by_segment,
                **self.shape(),
            )  # fmt: skip
            out = (cascade_attention(queries, plan, memory.kv, self.scale),)
            found.append(cascade_attention_lse(queries, plan, memory.kv, self.scale) if by_segment else out)
        seen = plan_request(at, self.requests(len(positions))[1][0], self.rotary[torch.float64], LIMIT, self.page)
        assert seen
        kv = self.memories[1].kv.double()
        truth = cascade_attention_lse_reference(queries.double(), [seen], kv, self.scale)
        return [*found, truth if by_segment else truth[:1]]

    def check(self, positions: list[int], backend: Backend, *, by_segment: bool = False, same: bool = True) -> None:
        """Own and shared pages give the same bits if they are read in the same steps, and what is true."""
        for own, shared, truth in zip(*self.attend(positions, backend, by_segment=by_segment), strict=True):
            assert not same or torch.equal(own, shared)
            finite = torch.isfinite(truth)
            assert torch.equal(torch.isfinite(shared), finite)
            near = TOLERANCE[self.dtype] * truth[finite].norm()
            assert (shared[finite].double() - truth[finite]).norm() <= near


PLACES = {
    128: [(22, 0, 0), (32, 0, 32), (50, 0, 64), (300, 1, 0), (64, 4, 0), (7, 4, 64), (1, 4, 96), (31, 5, 96)],
    64: [(22, 0, 0), (32, 0, 32), (300, 1, 0), (7, 6, 32), (1, 7, 0)],
}
"""Tokens, page and offset of entries, those of a page in order, so that torch's merge has the same order."""


@pytest.fixture(autouse=True)
def _seeded(seed: int, poisoned: None) -> None:
    """A fresh seed, and results that hold NaN until they are written."""


@pytest.mark.usefixtures("level")
@pytest.mark.skipif(native.obstacle() is not None, reason="C kernels can't run here")
@pytest.mark.parametrize("changes", [False, True], ids=["plain", "changed"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_c_kernels_give_the_same_bits(head_dim: int, rows: int, changes: bool) -> None:
    both = Both(128, head_dim, torch.bfloat16, PLACES[128])
    if changes:
        both.change(2, torch.rand(50) < 0.4, shifts=True)
        both.change(1, cut=(5, 3), shifts=False)
        both.change(7, torch.rand(20) < 0.4, shifts=False)
    both.add(rows, None, reserved=rows + 20)
    both.check(list(range(both.end - rows, both.end)), "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_segment", [False, True], ids=["together", "by_segment"])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_flash_attention_gives_the_same_bits(rows: int, by_segment: bool, dtype: torch.dtype) -> None:
    both = Both(128, 64, dtype, PLACES[128])
    both.change(2, torch.rand(50) < 0.4, shifts=False)
    both.change(1, cut=(5, 3), shifts=False)
    both.add(rows, None, reserved=rows + 20)
    both.check(list(range(both.end - rows, both.end)), "torch", by_segment=by_segment)


@pytest.mark.parametrize("rows", [1, 5])
def test_shifted_keys_by_torch_are_those_of_their_own_pages(rows: int) -> None:
    """Shifts are not for flash attention. Sums go over whole pages, where the entry is in another place."""
    both = Both(128, 64, torch.float32, PLACES[128])
    both.change(2, torch.rand(50) < 0.4, shifts=True)
    both.add(rows, None, reserved=rows + 20)
    both.check(list(range(both.end - rows, both.end)), "torch", same=False)


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_tokens_of_a_small_entry_see_themselves_and_what_is_before_them(backend: Backend, page: int) -> None:
    if backend == "native" and native.obstacle() is not None:
        pytest.skip("C kernels can't run here")
    both = Both(page, 64, torch.bfloat16, [(40, 0, 0), (32, 1, 0), (30, 1, 32)])
    both.check(list(range(both.end - 30, both.end)), backend)


@pytest.mark.parametrize("changes", [False, True], ids=["plain", "changed"])
@pytest.mark.parametrize("rows", [1, 3, 260])
def test_triton_gives_what_the_reference_gives(rows: int, changes: bool) -> None:
    """With 260 rows every item holds all that its rows see."""
    both = Both(64, 32, torch.float32, PLACES[64])
    if changes:
        both.change(1, torch.rand(32) < 0.4, shifts=True)
        both.change(3, cut=(2, 1), shifts=False)
    both.add(rows, None, reserved=rows + 20)
    both.check(list(range(both.end - rows, both.end)), "triton", by_segment=rows == 3, same=False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_weights_of_keys_are_those_of_their_own_pages(backend: Backend) -> None:
    both, rows, found = Both(64, 32, torch.float32, PLACES[64]), 3, []
    both.change(1, torch.rand(32) < 0.4, shifts=True)
    both.add(rows, None)
    queries, positions = both.queries(rows), torch.arange(both.end - rows, both.end)
    for memory, (request,) in zip(both.memories, both.requests(rows), strict=True):
        plan = plan_key_weights(
            positions, request, both.rotary[torch.float32], dtype=both.dtype, backend=backend, **both.shape()
        )
        _, weights = plan.attend(queries, memory.kv, both.scale)
        found.append(weights_by_segment(weights.amax(0), request.segments, 64))
    seen = plan_request(positions, both.requests(rows)[1][0], both.rotary[torch.float64], LIMIT, 64)
    assert seen
    truth = largest_weights_reference(queries.double(), seen, both.memories[1].kv.double(), both.scale).amax(0)
    wanted = weights_by_segment(truth, both.segments[1], 64)
    for own, shared, true in zip(*found, wanted, strict=True):
        torch.testing.assert_close(shared.double(), true, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(shared, own, rtol=2e-5, atol=1e-6)


def live(both: Both, requests: Sequence[Request], positions: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Each request in a slot of a running batch."""
    plan = LivePlan(slots=8, group=GROUP, kv_heads=KV_HEADS, page_size=64, device=positions.device, item_pages=3)
    for slot, request in enumerate(requests):
        assert plan.join(slot, request.segments) is None
    plan.integrity()
    plan.upload()
    attention = plan.plan(positions, *both.rotary[torch.float32].table(LIMIT))
    return lambda queries, kv: attention.attend(queries, kv, both.scale)


def static(both: Both, requests: Sequence[Request], positions: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Each request a question of one token."""
    cos, sin = both.rotary[torch.float32].table(LIMIT)
    plan = StaticPlan(
        rows=len(positions), positions=positions, cos=cos, sin=sin, group=GROUP, kv_heads=KV_HEADS, page_size=64,
        room=Room(),
    )  # fmt: skip
    assert plan.load(requests) is None
    return lambda queries, kv: plan.plan.attend(queries, kv, both.scale)


@pytest.mark.parametrize("tables", [live, static], ids=["running batch", "questions"])
@pytest.mark.parametrize("changes", [False, True], ids=["plain", "changed"])
def test_graphs_tables_know_entries_that_share_a_page(tables, changes: bool) -> None:
    """Requests that see one, another, or both of the entries of a page."""
    both = Both(64, 32, torch.float32, PLACES[64])
    if changes:
        both.change(1, torch.rand(32) < 0.4, shifts=True)
    choices = ((0, 1, 2, 3, 4), (1,), (0,), (1, 0, 1), (4, 1))
    requests, positions = [], []
    for row, chosen in enumerate(choices):
        segments, origin = [], row
        for place in chosen:
            segment = both.segments[1][place]
            segments.append(replace(segment, origin=origin))
            origin += segment.stop - segment.start
        requests.append(Request(slice(row, row + 1), tuple(segments)))
        positions.append(origin + row % 2 - 1)
    at, kv = torch.tensor(positions), both.memories[1].kv
    queries = both.queries(len(positions))
    out = tables(both, requests, at)(queries, kv)
    plans = [plan_request(at, each, both.rotary[torch.float64], LIMIT, 64) for each in requests]
    truth = cascade_attention_reference(queries.double(), [plan for plan in plans if plan], kv.double(), both.scale)
    assert (out.double() - truth).norm() <= TOLERANCE[torch.float32] * truth.norm()
