"""The attention reference against a dense softmax in float64, on ragged and awkward segments."""

import pytest
import torch

from braidsdk.kernels.attention import cascade_attention, plan_attention
from braidsdk.kernels.paging import PagedSegment, Request, append, slots_of
from braidsdk.kernels.rope import RotaryTable, rotate

PAGE = 16
THETA = 1e4


def table(head_dim: int, dtype: torch.dtype = torch.float64) -> RotaryTable:
    inv_freq = 1.0 / (THETA ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    return RotaryTable(inv_freq, 1.0, dtype, torch.device("cpu"))


class Memory:
    """Paged memory of one layer: NaN in pages that hold nothing, large values in the padding of those that do."""

    def __init__(self, kv_heads: int, head_dim: int, pages: int = 64) -> None:
        self.kv = torch.full((2, pages, kv_heads, PAGE, head_dim), float("nan"), dtype=torch.float64)
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.free = torch.randperm(pages).tolist()
        self.rotary = table(head_dim)

    def write(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append an entry of random keys; returns its pages, unrotated keys and values [tokens, kv_heads, head_dim]."""
        pages = torch.tensor([self.free.pop() for _ in range(-(-tokens // PAGE) or 1)])
        self.kv[:, pages] = 1e6
        keys, values = torch.randn(2, tokens, self.kv_heads, self.head_dim, dtype=torch.float64)
        cos, sin = self.rotary.at(torch.arange(tokens), tokens + 1)
        append(self.kv, slots_of(pages, torch.arange(tokens), PAGE), rotate(keys, cos, sin), values)
        return pages, keys, values

    def attend(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        requests: list[Request],
        scale: float,
        dtype: torch.dtype = torch.float64,
    ) -> torch.Tensor:
        """Attention in `dtype`: float64 takes the reference, float32 the CPU's own path."""
        group = queries.shape[1] // self.kv_heads
        rotary = table(self.head_dim, dtype)
        plans = plan_attention(
            positions, requests, rotary, limit=1000, page_size=PAGE, group=group, kv_heads=self.kv_heads, dtype=dtype
        )
        return cascade_attention(queries.to(dtype), plans, self.kv.to(dtype), scale).double()


def dense(queries: torch.Tensor, positions: torch.Tensor, placed: list, scale: float) -> torch.Tensor:
    """Textbook attention: keys rotated to absolute positions, one softmax. placed: (keys, values, positions)."""
    keys = torch.cat([k for k, _, _ in placed])
    values = torch.cat([v for _, v, _ in placed])
    at = torch.cat([p for _, _, p in placed])
    head_dim, group = queries.shape[2], queries.shape[1] // keys.shape[1]
    inv_freq = 1.0 / (THETA ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def turn(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        angle = p[:, None].double() * inv_freq.double()
        return rotate(x, angle.cos(), angle.sin())

    keys = turn(keys, at).repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", turn(queries, positions), keys) * scale
    scores = scores.masked_fill(at[None] > positions[:, None], float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1))


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 2e-5)]
"""Each path, and its distance from the truth: sums in another order; 1e6 in the padding leaves no room for leaks."""


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["reference", "cpu"])
@pytest.mark.parametrize("lengths", [(1,), (15, 16, 17), (1, 63, 65), (40, 1, 130)], ids=str)
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(2, 2, 64), (8, 2, 64), (8, 1, 32)])
def test_segments_anywhere_equal_dense_attention(
    lengths: tuple[int, ...], q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(len(lengths) + q_heads)
    memory = Memory(kv_heads, head_dim)
    entries = [memory.write(n) for n in lengths]
    segments, placed, position = [], [], 0
    for (pages, keys, values), n in zip(reversed(entries), reversed(lengths), strict=True):
        a, b = n // 3, n - n // 5  # a slice that starts and ends inside the entry
        origin = position - a
        segments.append(PagedSegment(pages, a, b, origin))
        placed.append((keys[a:b], values[a:b], origin + torch.arange(a, b)))
        position += b - a
    # Rows after the context, and some inside it, as a repair would compute them.
    positions = torch.tensor([max(position - 2, 0), position // 2, position, position + 7])
    few = torch.randn(len(positions), q_heads, head_dim, dtype=torch.float64)
    many = torch.randn(600, q_heads, head_dim, dtype=torch.float64)
    spread = torch.randint(0, position + 9, (600,))
    segments.insert(1, PagedSegment(entries[0][0], 0, 0, 3))  # an empty one
    for queries, at in ((few, positions), (many, spread), (many, spread.sort().values)):
        got = memory.attend(queries, at, [Request(slice(0, len(at)), tuple(segments))], 0.3, dtype)
        torch.testing.assert_close(got, dense(queries, at, placed, 0.3), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["reference", "cpu"])
@pytest.mark.parametrize("copies", [1, 300], ids=["few rows", "many rows"])
def test_requests_see_only_their_own_segments_and_share_entries_at_different_positions(
    dtype: torch.dtype, tolerance: float, copies: int
) -> None:
    torch.manual_seed(3)
    memory = Memory(2, 64)
    first, second = memory.write(33), memory.write(20)
    queries = torch.randn(3 * copies, 4, 64, dtype=torch.float64)
    positions = torch.tensor([53, 60] * copies + [33] * copies)
    seeing = slice(0, 2 * copies)
    requests = [
        Request(seeing, (PagedSegment(first[0], 0, 33, 0), PagedSegment(second[0], 0, 20, 33))),
        Request(slice(2 * copies, 3 * copies), (PagedSegment(first[0], 0, 33, 100),)),  # all of it after the rows
    ]
    got = memory.attend(queries, positions, requests, 0.1, dtype)
    placed = [(*first[1:], torch.arange(33)), (*second[1:], 33 + torch.arange(20))]
    want = dense(queries[seeing], positions[seeing], placed, 0.1)
    torch.testing.assert_close(got[seeing], want, rtol=tolerance, atol=tolerance)
    assert torch.count_nonzero(got[2 * copies :]) == 0, "a row that sees no key is zero, not NaN"


def test_a_request_without_segments_or_rows_gives_zeros() -> None:
    memory = Memory(2, 64)
    pages, _, _ = memory.write(3)
    queries = torch.randn(2, 4, 64, dtype=torch.float64)
    requests = [Request(slice(0, 2), ()), Request(slice(2, 2), (PagedSegment(pages, 0, 3, 0),))]
    assert torch.equal(memory.attend(queries, torch.arange(2), requests, 1.0), torch.zeros_like(queries))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    memory = Memory(2, 64)
    pages, _, _ = memory.write(50)
    queries = torch.randn(50, 4, 64, dtype=torch.float64)
    requests = [Request(slice(0, 50), (PagedSegment(pages, 0, 50, 0),))]
    whole = memory.attend(queries, torch.arange(50), requests, 0.2)
    monkeypatch.setattr("braidsdk.kernels.attention.eager.BLOCK_ELEMENTS", 7 * 4 * (64 + 64))
    torch.testing.assert_close(memory.attend(queries, torch.arange(50), requests, 0.2), whole, rtol=1e-12, atol=1e-14)


def test_angles_at_high_positions_are_those_of_float64() -> None:
    rotary = table(64, torch.float32)
    cos, _ = rotary.at(torch.tensor([131_071]), 131_072)
    inv_freq = 1.0 / (THETA ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    torch.testing.assert_close(cos[0].double(), (131_071 * inv_freq.double()).cos(), rtol=0, atol=6e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["reference", "cpu"])
@pytest.mark.parametrize("rows", [1, 300])
def test_a_shift_is_added_to_each_key_and_value(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    memory = Memory(kv_heads=2, head_dim=64)
    first, keys, values = memory.write(40)
    second, *plain = memory.write(20)
    shifts, shift_keys, shift_values = memory.write(3)
    positions, queries = torch.arange(60, 60 + rows), torch.randn(rows, 6, 64, dtype=torch.float64)
    origin = 5  # of the first; its shift is a key in its frame
    cos, sin = memory.rotary.at(torch.full((1,), 2), 100)
    turned = rotate(shift_keys[2:], cos, sin)  # as it lies in memory, in slot 2
    back = memory.rotary.at(torch.arange(40), 100)
    moved = keys + rotate(turned.expand(40, -1, -1), back[0], -back[1])  # added after the keys' own rotation
    segments = (
        PagedSegment(first, 0, 40, origin, shift=int(shifts[0]) * PAGE + 2),
        PagedSegment(second, 0, 20, 0),
    )
    found = memory.attend(queries, positions, [Request(slice(0, rows), segments)], 0.125, dtype)
    placed = [(moved, values + shift_values[2], torch.arange(40) + origin), (*plain, torch.arange(20))]
    truth = dense(queries, positions, placed, 0.125)
    assert float((found - truth).abs().max()) <= tolerance * float(truth.abs().max())
