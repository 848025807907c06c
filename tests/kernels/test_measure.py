"""What is counted of the operations' calls: how often, which backend, and bytes by their shapes."""

from collections.abc import Iterator

import pytest
import torch

from braidsdk.kernels import measure
from braidsdk.kernels.attention import cascade_attention, plan_attention
from braidsdk.kernels.head import norm_head
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.paging import PagedSegment, Request
from braidsdk.kernels.rope import RotaryTable
from braidsdk.kernels.swiglu import norm_swiglu

ROWS, HIDDEN, INNER, HEAD_DIM, Q_HEADS, KV_HEADS, PAGE, VOCAB = 3, 32, 48, 16, 4, 2, 64, 40
EPS = 1e-6


@pytest.fixture(autouse=True)
def measuring() -> Iterator[None]:
    measure.start()
    yield
    measure.stop()


def forward(device: torch.device, backend: str, times: int = 1) -> None:
    """Every operation, `times` times, in float32: 3 rows of two requests over one entry of 70 tokens."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    kv = random(2, 4, KV_HEADS, PAGE, HEAD_DIM)
    entry = PagedSegment(torch.tensor([2, 1]), 0, 70, 0)
    requests = [Request(slice(0, 2), (entry,)), Request(slice(2, 3), (entry,))]
    rotary = RotaryTable(torch.rand(HEAD_DIM // 2), 1.0, torch.float32, device)
    plans = plan_attention(
        torch.tensor([80, 81, 90], device=device), requests, rotary,
        limit=100, page_size=PAGE, group=Q_HEADS // KV_HEADS, kv_heads=KV_HEADS, dtype=torch.float32, backend=backend,
    )  # fmt: skip
    heads = Q_HEADS + 2 * KV_HEADS
    weights = NormQKVWeights(random(HIDDEN), random(heads * HEAD_DIM, HIDDEN), None, random(HEAD_DIM), random(HEAD_DIM))
    hidden, angles = random(ROWS, HIDDEN), random(ROWS, HEAD_DIM // 2)
    slots = torch.arange(ROWS, device=device)
    for _ in range(times):
        queries = norm_qkv(hidden, weights, EPS, angles, angles, kv, slots, backend=backend)
        attended = cascade_attention(queries, plans, kv, 0.1)
        out_proj(attended.flatten(1), random(HIDDEN, Q_HEADS * HEAD_DIM), None, hidden, backend=backend)
        norm_swiglu(hidden, random(HIDDEN), random(2 * INNER, HIDDEN), EPS, backend=backend)
        norm_head(hidden, random(HIDDEN), random(VOCAB, HIDDEN), EPS, backend=backend)


def expected_bytes(backend: str) -> dict[str, int]:
    """By hand, in float32."""
    hidden, heads = ROWS * HIDDEN, Q_HEADS + 2 * KV_HEADS
    queries = ROWS * Q_HEADS * HEAD_DIM
    weights = HIDDEN + heads * HEAD_DIM * HIDDEN + 2 * HEAD_DIM
    appended, angles = 2 * ROWS * KV_HEADS * HEAD_DIM, 2 * ROWS * HEAD_DIM // 2
    pages = 2 * (1 if backend == "triton" else 2)  # the kernel reads them once for both requests
    return {
        "norm_qkv": 4 * (hidden + weights + angles + queries + appended) + 8 * ROWS,
        "attention": 4 * (2 * queries + pages * 2 * KV_HEADS * PAGE * HEAD_DIM),
        "out_proj": 4 * (queries + HIDDEN * Q_HEADS * HEAD_DIM + 2 * hidden),
        "swiglu": 4 * (hidden + HIDDEN + 2 * INNER * HIDDEN + ROWS * INNER),
        "head": 4 * (hidden + HIDDEN + VOCAB * HIDDEN + ROWS * VOCAB),
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_calls_paths_and_bytes_are_counted(backend: str, device: torch.device) -> None:
    forward(device, backend, times=2)
    totals = measure.totals()
    want = expected_bytes(backend)
    assert {key: total.bytes for key, total in totals.items()} == {(op, backend): 2 * n for op, n in want.items()}
    assert all(total.calls == 2 for total in totals.values())


def test_on_a_cpu_every_call_is_timed() -> None:
    forward(torch.device("cpu"), "torch", times=3)
    totals = measure.totals().values()
    assert [total.timed for total in totals] == [3] * 5
    assert all(total.seconds > 0 for total in totals)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_a_gpu_what_does_not_compile_is_timed(backend: str, device: torch.device) -> None:
    forward(device, backend)  # compiles
    measure.start()
    forward(device, backend, times=20)
    for total in measure.totals().values():
        assert total.timed >= 10
        assert total.seconds / total.timed < 2e-3


def test_nothing_is_counted_unless_asked_for() -> None:
    measure.stop()
    forward(torch.device("cpu"), "torch")
    assert measure.totals() == {}
    measure.start()
    assert measure.totals() == {}
