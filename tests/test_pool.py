"""The paged pool: growth, eviction, pins, deletion under a running call."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from braidsdk import Braid
from braidsdk.errors import PoolFullError
from braidsdk.kernels.attention import cascade_attention, plan_attention
from braidsdk.kernels.paging import PagedSegment, Request, append, slots_of
from braidsdk.kernels.rope import RotaryTable
from braidsdk.pool import Pool, Resident
from braidsdk.store.keys import EntryKey, ModelIdentity, sha256_of_tokens

MODEL = ModelIdentity("w", "t", "float32", "none", 2, 1, 8, "{}")
PAGE = 4


def key(chunk: str, tokens: int = PAGE, after: tuple[str, ...] = ()) -> EntryKey:
    return EntryKey(MODEL, "default", chunk * 32, 1, tuple(range(tokens)), after, sha256_of_tokens(()))


def make_pool(pages: int) -> Pool:
    page_bytes = 2 * 2 * 1 * PAGE * 8 * 4
    return Pool(
        layers=2,
        kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        capacity_bytes=pages * page_bytes,
        page_size=PAGE,
    )


def put(pool: Pool, entry_key: EntryKey) -> Resident:
    entry = Resident(entry_key, pool.allocate(len(entry_key.token_ids)), stored=False)
    pool.adopt(entry)
    return entry


def test_growing_keeps_what_is_there_and_new_pages_are_zero() -> None:
    pool = make_pool(100)
    first = put(pool, key("a", 3 * PAGE))
    pool.kv[:, :, first.pages] = 5.0
    more = pool.allocate(60 * PAGE)
    assert torch.all(pool.kv[:, :, first.pages] == 5.0)
    assert torch.all(pool.kv[:, :, more] == 0.0)
    assert not set(first.pages.tolist()) & set(more.tolist())


def test_released_pages_come_back_zeroed() -> None:
    pool = make_pool(2)
    pages = pool.allocate(2 * PAGE)
    pool.kv[:, :, pages] = 1.0
    pool.release(pages)
    assert torch.all(pool.kv[:, :, pool.allocate(2 * PAGE)] == 0.0)


def test_the_memory_of_pages_is_that_of_their_keys_and_then_their_values() -> None:
    pool = make_pool(9)
    pool.reserve(9)
    pool.kv.copy_(torch.arange(pool.kv.numel()).view(pool.kv.shape))
    for ids in ([4], [2, 3, 4], [7, 1, 2, 8]):
        pages = torch.tensor(ids)
        for layer, pieces in zip(pool.kv, pool.memory_of(pages), strict=True):
            assert b"".join(pieces) == layer[:, pages].contiguous().numpy().tobytes()
    assert len(pool.memory_of(torch.tensor([2, 3, 4]))[0]) == 2


def test_the_least_recently_used_entry_makes_room() -> None:
    pool = make_pool(3)
    keys = [key(name) for name in "abc"]
    for each in keys:
        put(pool, each)
    pool.get(keys[0].digest)
    pool.peek(keys[1].digest)  # looking is no use
    pool.allocate(1)
    assert [pool.peek(each.digest) is not None for each in keys] == [True, False, True]


def test_pinned_entries_stay_and_exhaustion_is_a_typed_error() -> None:
    pool = make_pool(3)
    keys = [key("a"), key("b")]
    with pool.pinned(keys):
        for each in keys:
            put(pool, each)
        with pytest.raises(PoolFullError, match="held by running calls"):
            pool.allocate(2 * PAGE)
        assert all(pool.peek(each.digest) for each in keys)
    pool.allocate(2 * PAGE)


def test_an_entry_deleted_under_a_running_call_keeps_its_pages_until_the_call_ends() -> None:
    pool = make_pool(1)
    with pool.pinned([key("a")]):
        entry = put(pool, key("a"))
        pool.drop_chunks({"a" * 32})
        assert pool.peek(key("a").digest) is None
        with pytest.raises(PoolFullError):
            pool.allocate(1)
    assert pool.allocate(1).tolist() == entry.pages.tolist()


def test_dropping_a_chunk_drops_what_was_computed_with_sight_of_it() -> None:
    pool = make_pool(4)
    seen, other = key("b", after=("a" * 32,)), key("c", after=("b" * 32,))
    for each in (key("a"), seen, other):
        put(pool, each)
    pool.drop_chunks({"a" * 32})
    assert pool.peek(seen.digest) is None
    assert pool.peek(other.digest) is not None


def test_what_can_never_fit_is_said_before_anything_happens() -> None:
    pool = make_pool(3)
    pool.check_capacity([key("a"), key("a"), key("b")], tail_tokens=1)
    with pytest.raises(PoolFullError, match="larger pool_bytes"):
        pool.check_capacity([key("a"), key("b")], tail_tokens=PAGE + 1)


def test_pages_past_two_to_the_31_elements_per_layer_are_addressed_right() -> None:
    """Offsets are 64-bit: the same numbers come out of the highest pages as of the lowest ones."""
    layers, kv_heads, page_size, head_dim = 1, 8, 64, 128
    pages = 2**31 // (2 * kv_heads * page_size * head_dim) + 40
    pool = Pool(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        capacity_bytes=pages * 2 * kv_heads * page_size * head_dim * 2,
        page_size=page_size,
    )
    pool._grow(pages)  # only touched pages take memory
    assert pool.kv[0].numel() > 2**31
    torch.manual_seed(0)
    keys, values = torch.randn(2, 100, kv_heads, head_dim).bfloat16()
    rotary = RotaryTable(torch.rand(head_dim // 2), 1.0, torch.float32, torch.device("cpu"))
    outs = []
    for _ in range(2):
        mine = pool.allocate(100)
        append(pool.kv[0], slots_of(mine, 0, 100, page_size), keys, values)
        for rows in (3, 100):
            plans = plan_attention(
                torch.arange(100 - rows, 100),
                [Request(slice(0, rows), (PagedSegment(mine, 0, 100, 0),))],
                rotary,
                limit=100,
                page_size=page_size,
                group=2,
                kv_heads=kv_heads,
                dtype=torch.bfloat16,
            )
            queries = torch.cat([keys, keys], 1)[-rows:]
            outs.append(cascade_attention(queries, plans, pool.kv[0], 0.1))
        pool._free.reverse()
        assert int(mine.max()) in (1, pages - 1)
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def test_past_turns_make_room_before_memory_grows_for_more_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braidsdk.pool.KEPT_TURNS", 2)
    pool = make_pool(100)
    turns = [replace(key(name), level=2, chunk_id=None, after_sha256=name) for name in "abcdefgh"]
    document = put(pool, key("d"))
    for each in turns:
        put(pool, each)
    assert pool.peek(document.key.digest)
    assert pool.peek(turns[-1].digest)
    assert pool.peek(turns[0].digest) is None
    assert pool.kv.shape[2] <= 8, "memory for the document, three turns, and what doubling gave"


def test_growing_without_memory_is_a_typed_error_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(100)
    pool.release(pool.allocate(4 * PAGE))
    have = pool.kv.shape[2]

    def full(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", full)
        with pytest.raises(PoolFullError, match="smaller pool_bytes"):
            pool.allocate((have + 1) * pool.page_size)
    taken = [page for _ in range(have + 1) for page in pool.allocate(pool.page_size).tolist()]
    assert len(set(taken)) == len(taken) == have + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lies_in_unused_memory_never_matters(random_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    found = []
    for index, filling in enumerate((0.0, float("nan"))):
        with Braid(random_checkpoint, store=tmp_path / str(index), device="cpu", dtype=dtype) as braid:
            braid._engine.pool.kv.fill_(filling)
            texts = [f"Oslo is cold. Rome is warm. {'So it is said. ' * n}" for n in (1, 9, 40)]
            chunks = braid.register_many(texts, anchor=braid.register_system("You answer."), progress=False)
            answer = braid.ask("Where?", chunks=chunks, max_new_tokens=12)
            again = braid.ask("And where else?", chunks=chunks[:1], max_new_tokens=12)
            found.append((answer.token_ids, again.token_ids))
    assert found[0] == found[1]
