"""The log-sum-exp of each segment's scores, on every backend, against plain sums in float64."""

import math

import pytest
import torch
from torch import Tensor

from braidsdk.kernels.attention import cascade_attention, cascade_attention_lse, launch, plan_attention
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable, rotate

PAGE, HEAD_DIM, KV_HEADS, GROUP, LIMIT = 64, 64, 2, 2, 2048
SCALE = HEAD_DIM**-0.5
INV_FREQ = 1.0 / (1e4 ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM))

BACKENDS = [
    pytest.param("torch", torch.float64, 1e-10, id="reference"),
    pytest.param("torch", torch.float32, 1e-5, id="torch"),
    pytest.param("triton", torch.float32, 1e-5, id="triton"),
    pytest.param("triton", torch.bfloat16, 3e-2, id="triton in bfloat16", marks=pytest.mark.gpu),
]
"""Path, dtype, and how far a score may be off: sums of 64 products of a size near 1, rounded in that dtype."""

Asked = list[tuple[list[PagedSegment], list[int]]]
"""Requests: segments, and positions of rows."""


class Memory:
    """Random keys and values, large numbers where no entry lies."""

    def __init__(self, pages: int = 96) -> None:
        self.kv = torch.full((2, pages, KV_HEADS, PAGE, HEAD_DIM), 1e4, dtype=torch.float64)
        self._free = torch.randperm(pages).tolist()

    def entry(self, tokens: int) -> Tensor:
        pages = torch.tensor([self._free.pop() for _ in range(-(-tokens // PAGE))])
        for at, page in enumerate(pages.tolist()):
            filled = min(PAGE, tokens - at * PAGE)
            self.kv[:, page, :, :filled] = torch.randn(2, KV_HEADS, filled, HEAD_DIM, dtype=torch.float64)
        return pages


def typical(memory: Memory) -> Asked:
    """Entries shared in other orders and slices, one twice, hidden keys, empty and unseen segments, no segments."""
    long, middle, short, own, tail = (memory.entry(tokens) for tokens in (200, 64, 17, 40, 9))
    some, every = torch.rand(200) < 0.4, torch.ones(64, dtype=torch.bool)
    return [
        (
            [
                PagedSegment(long, 0, 200, 0),
                PagedSegment(middle, 5, 5, 200),
                PagedSegment(middle, 0, 64, 200),
                PagedSegment(own, 0, 40, 264),
                PagedSegment(tail, 0, 9, 304),
            ],
            [263, 264, 312, 100],
        ),
        (
            [
                PagedSegment(short, 3, 17, 0),
                PagedSegment(long, 65, 190, -40),
                PagedSegment(long, 0, 200, 300, some),
            ],
            [90, 520],
        ),
        ([], [7]),
        ([PagedSegment(middle, 0, 64, 0, every), PagedSegment(short, 0, 17, 700)], [600]),
        ([PagedSegment(short, 9, 9, 0)], [3]),
        ([PagedSegment(middle, 1, 64, 900)], [910, 2000]),
    ]


def many_rows(memory: Memory) -> Asked:
    """As in a prefill, over a shared anchor."""
    anchor, one, other = memory.entry(70), memory.entry(20), memory.entry(30)
    return [
        ([PagedSegment(anchor, 0, 70, 0), PagedSegment(one, 0, 20, 70)], list(range(70, 90))),
        ([PagedSegment(anchor, 0, 70, 0), PagedSegment(other, 0, 30, 70)], list(range(70, 100))),
    ]


def in_float64(queries: Tensor, asked: Asked, kv: Tensor) -> Tensor:
    """Scores one by one, keys at their absolute positions: [rows, q_heads, segments], to base e."""

    def turned(x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None].double() * INV_FREQ.double()
        return rotate(x, angles.cos(), angles.sin())

    most = max(len(segments) for segments, _ in asked)
    found, row = torch.full((len(queries), KV_HEADS * GROUP, most), -math.inf, dtype=torch.float64), 0
    for segments, positions in asked:
        at = torch.tensor(positions)
        mine = slice(row, row + len(positions))
        row += len(positions)
        for place, segment in enumerate(segments):
            keys = kv[0, segment.pages].transpose(1, 2).flatten(0, 1)[segment.start : segment.stop]
            tokens = torch.arange(segment.start, segment.stop)
            moved = turned(keys, torch.full_like(tokens, segment.origin)).repeat_interleave(GROUP, 1)
            scores = torch.einsum("qhd,khd->qhk", turned(queries[mine], at), moved) * SCALE
            unseen = tokens + segment.origin > at[:, None]
            if segment.hidden is not None:
                unseen |= segment.hidden[segment.start : segment.stop]
            found[mine, :, place] = scores.masked_fill(unseen[:, None], -math.inf).logsumexp(-1)
    return found


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("ask", [typical, many_rows])
def test_each_segment_has_the_log_of_its_own_sum(ask, backend, dtype, tolerance, device, seed, monkeypatch) -> None:
    monkeypatch.setattr(launch, "MANY_ROWS", 40)  # many for the interpreter
    memory = Memory()
    asked = ask(memory)
    rows = sum(len(positions) for _, positions in asked)
    queries = torch.randn(rows, KV_HEADS * GROUP, HEAD_DIM, dtype=torch.float64)
    positions = torch.tensor([position for _, at in asked for position in at])
    requests, row = [], 0
    for segments, at in asked:
        requests.append(Request(slice(row, row + len(at)), tuple(segments)))
        row += len(at)
    rounded, kv = queries.to(device, dtype), memory.kv.to(device, dtype)

    def planned(**how: bool) -> tuple:
        rotary = RotaryTable(INV_FREQ, 1.0, torch.promote_types(dtype, torch.float32), device)
        shape = {"limit": LIMIT, "page_size": PAGE, "group": GROUP, "kv_heads": KV_HEADS}
        return plan_attention(positions.to(device), requests, rotary, dtype=dtype, backend=backend, **shape, **how)

    plans = planned(by_segment=True)
    out, lse = cascade_attention_lse(rounded, plans, kv, SCALE)
    truth = in_float64(rounded.double().cpu(), asked, kv.double().cpu())
    lse = lse.double().cpu()

    assert lse.shape == truth.shape
    assert torch.equal(lse.isneginf(), truth.isneginf())
    seen = ~truth.isneginf()
    assert (lse[seen] - truth[seen]).abs().max() <= tolerance
    assert ((lse.logsumexp(-1) - truth.logsumexp(-1)).nan_to_num(0.0).abs() <= tolerance).all()
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out, cascade_attention(rounded, plans, kv, SCALE), **near)
    torch.testing.assert_close(out, cascade_attention(rounded, planned(), kv, SCALE), **near)
    assert torch.equal(lse, cascade_attention_lse(rounded, plans, kv, SCALE)[1].double().cpu()), "not the same again"


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_a_batch_that_sees_nothing_has_no_segments(backend, dtype, tolerance, device) -> None:
    rotary = RotaryTable(INV_FREQ, 1.0, torch.promote_types(dtype, torch.float32), device)
    plans = plan_attention(
        torch.arange(2, device=device), [Request(slice(0, 2), ())], rotary, limit=8, page_size=PAGE, group=GROUP,
        kv_heads=KV_HEADS, dtype=dtype, backend=backend, by_segment=True,
    )  # fmt: skip
    queries = torch.randn(2, KV_HEADS * GROUP, HEAD_DIM, dtype=dtype, device=device)
    kv = torch.zeros(2, 1, KV_HEADS, PAGE, HEAD_DIM, dtype=dtype, device=device)
    out, lse = cascade_attention_lse(queries, plans, kv, SCALE)
    assert (lse.shape, out.any()) == ((2, KV_HEADS * GROUP, 0), False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_plans_of_another_kind_are_refused(backend, device) -> None:
    rotary = RotaryTable(INV_FREQ, 1.0, torch.float32, device)
    memory = Memory()
    requests = [Request(slice(0, 1), (PagedSegment(memory.entry(3), 0, 3, 0),))]
    if backend == "torch" and device.type == "cuda":
        pytest.skip("there all plans of torch's backend are of one kind")
    plans = plan_attention(
        torch.tensor([5], device=device), requests, rotary, limit=8, page_size=PAGE, group=GROUP, kv_heads=KV_HEADS,
        dtype=torch.float32, backend=backend,
    )  # fmt: skip
    queries = torch.randn(1, KV_HEADS * GROUP, HEAD_DIM, device=device)
    with pytest.raises(ValueError, match="by_segment=True"):
        cascade_attention_lse(queries, plans, memory.kv.to(device, torch.float32), SCALE)
