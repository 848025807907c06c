"""Largest softmax weights of keys on each backend, against the reference in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.attention import launch as attention
from braidsdk.kernels.attention.plan import plan_request
from braidsdk.kernels.key_weights import eager, launch, plan_key_weights, weights_by_segment
from braidsdk.kernels.key_weights.reference import largest_weights_reference
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable, rotate

PAGE, LIMIT = 64, 2048
GEOMETRIES = [(2, 2, 64), (1, 7, 64), (1, 1, 96), (2, 5, 16)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of a weight: its score, a sum of products of about 1, is off by so much."""


class Case:
    """Random paged memory, NaN wherever no entry's token lies, and one request over it."""

    def __init__(self, kv_heads: int, group: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = {"limit": LIMIT, "page_size": PAGE, "group": group, "kv_heads": kv_heads}
        self.kv = torch.full((2, 40, kv_heads, PAGE, head_dim), float("nan"), dtype=dtype)
        self.device, self.dtype, self.scale = device, dtype, head_dim**-0.5
        self.free, self.segments, self.end = torch.randperm(40).tolist(), [], 0
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.rotary = {d: RotaryTable(inv_freq, 1.0, d, device) for d in (torch.float32, torch.float64)}

    def entry(self, tokens: int) -> Tensor:
        pages = torch.tensor([self.free.pop() for _ in range(-(-tokens // PAGE))])
        for at, page in enumerate(pages.tolist()):
            filled = min(PAGE, tokens - at * PAGE)
            self.kv[:, page, :, :filled] = torch.randn_like(self.kv[:, page, :, :filled])
        return pages

    def add(self, tokens: int, start: int = 0, **changes: object) -> None:
        self.segments.append(PagedSegment(self.entry(tokens), start, tokens, self.end - start, **changes))
        self.end += tokens - start

    def request(self, rows: int) -> Request:
        return Request(slice(0, rows), tuple(self.segments))

    def check(self, backend: str, positions: list[int]) -> Tensor:
        """Both results of a backend; the weights are given back."""
        at, request = torch.tensor(positions, device=self.device), self.request(len(positions))
        heads = self.shape["kv_heads"] * self.shape["group"]
        queries = torch.randn(len(positions), heads, self.kv.shape[4], dtype=self.dtype).to(self.device)
        kv = self.kv.to(self.device)
        plan = plan_key_weights(
            at, request, self.rotary[torch.float32], dtype=self.dtype, backend=backend, **self.shape
        )
        given = kv if backend == "triton" else kv.nan_to_num(0.0)  # what no row sees must be finite for torch
        attended, weights = plan.attend(queries, given, self.scale)
        seen = plan_request(at, request, self.rotary[torch.float64], LIMIT, PAGE)
        truth = largest_weights_reference(queries.double(), seen, kv.double().nan_to_num(0.0), self.scale)
        assert weights.shape == truth.shape
        assert not weights[truth == 0].any()
        near = TOLERANCE[self.dtype]
        torch.testing.assert_close(weights.double(), truth, rtol=near, atol=1e-6)
        torch.testing.assert_close(attended, plan.attention.attend(queries, given, self.scale))
        return weights


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_backends_agree(kv_heads, group, head_dim, rows, backend, device, dtype, seed) -> None:
    """Ragged segments and slices, hidden keys, shifts, an empty segment; rows that see only some of it, more of them
    than one product takes; the last position is reserved and not filled."""
    case = Case(kv_heads, group, head_dim, device, dtype)
    shifts = case.entry(9)
    case.add(1)
    case.add(70, start=3)
    case.add(130, hidden=torch.rand(130) < 0.3, shift=int(shifts[0]) * PAGE + 4)
    case.segments.append(PagedSegment(case.entry(5), 2, 2, case.end))
    case.add(64, shift=int(shifts[0]) * PAGE + 8)
    case.segments.append(PagedSegment(case.entry(50), 0, 60, case.end))
    case.check(backend, [case.end + at for at in range(rows)] if rows > 1 else [case.end - 1])


@pytest.mark.skipif(native.obstacle() is not None, reason="C kernels can't run here")
def test_beside_the_attention_of_the_c_kernels(seed) -> None:
    case = Case(2, 2, 64, torch.device("cpu"), torch.bfloat16)
    case.add(100)
    case.add(30, start=4)
    positions = list(range(case.end - 3, case.end))
    weights = [(torch.manual_seed(seed), case.check(backend, positions))[1] for backend in ("torch", "native")]
    assert torch.equal(*weights)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_see_nothing_give_no_weight(backend, device, seed) -> None:
    case = Case(1, 2, 64, device, torch.float32)
    case.add(20)
    case.segments = [replace(case.segments[0], origin=100), replace(case.segments[0], hidden=torch.ones(20).bool())]
    assert not case.check(backend, [10, 50]).any()


def test_many_rows_leave_partial_results(device, seed, monkeypatch) -> None:
    monkeypatch.setattr(attention, "MANY_ROWS", 30)
    monkeypatch.setattr(launch, "MANY_ROWS", 30)
    case = Case(2, 2, 64, device, torch.float32)
    case.add(100)
    case.add(50)
    case.check("triton", list(range(110, 150)))


def test_a_row_may_have_more_partial_results_than_are_merged_at_once(device, seed, monkeypatch) -> None:
    monkeypatch.setattr(attention, "work_items", lambda *_: 40)
    case = Case(1, 2, 64, device, torch.float32)
    for _ in range(36):
        case.add(7)
    case.check("triton", [case.end - 2, case.end - 1])


def test_blocks_of_rows_change_nothing(seed, monkeypatch) -> None:
    case = Case(2, 2, 64, torch.device("cpu"), torch.float32)
    case.add(150)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 3 * 4 * (192 + 64))
    case.check("torch", list(range(110, 150)))


def test_the_reference_is_the_largest_of_plain_weights(seed) -> None:
    """Keys at their absolute positions, one softmax over them."""
    case = Case(2, 3, 16, torch.device("cpu"), torch.float64)
    case.add(5)
    case.add(7, start=2)
    positions = torch.tensor([4, 9, 11])
    queries, rotary = torch.randn(3, 6, 16, dtype=torch.float64), case.rotary[torch.float64]
    plan = plan_request(positions, case.request(3), rotary, LIMIT, PAGE)
    weights = largest_weights_reference(queries, plan, case.kv.nan_to_num(0.0), case.scale)
    stored = [case.kv[0, each.pages[0], :, each.start : each.stop].transpose(0, 1) for each in case.segments]
    moved = [
        rotate(k, *rotary.at(torch.full((len(k),), s.origin), LIMIT))
        for k, s in zip(stored, case.segments, strict=True)
    ]
    keys = torch.cat(moved).repeat_interleave(3, 1)
    scores = torch.einsum("qhd,khd->hqk", rotate(queries, *rotary.at(positions, LIMIT)), keys) * case.scale
    truth = scores.masked_fill(torch.arange(10) > positions[:, None], -math.inf).softmax(-1)
    found = torch.cat([weights[:, :5], weights[:, PAGE + 2 : PAGE + 7]], 1)
    torch.testing.assert_close(found, truth.unflatten(0, (2, 3)).amax((1, 2)))
    first, second = weights_by_segment(weights[0], case.segments, PAGE)
    torch.testing.assert_close(torch.cat([first, second]), found[0])


def test_a_request_that_sees_nothing_is_refused(device) -> None:
    case = Case(1, 1, 16, device, torch.float32)
    case.segments = [PagedSegment(torch.zeros(1, dtype=torch.int64), 3, 3, 0)]
    with pytest.raises(ValueError, match="expected rows, and a segment with tokens"):
        case.check("torch", [5])
