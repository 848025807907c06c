"""The paged pool: growth, eviction, pins, deletion under a running call."""

import pytest
import torch

from braidsdk.errors import PoolFullError
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
        pool.drop_chunk("a" * 32)
        assert pool.peek(key("a").digest) is None
        with pytest.raises(PoolFullError):
            pool.allocate(1)
    assert pool.allocate(1).tolist() == entry.pages.tolist()


def test_dropping_a_chunk_drops_what_was_computed_with_sight_of_it() -> None:
    pool = make_pool(4)
    seen, other = key("b", after=("a" * 32,)), key("c", after=("b" * 32,))
    for each in (key("a"), seen, other):
        put(pool, each)
    pool.drop_chunk("a" * 32)
    assert pool.peek(seen.digest) is None
    assert pool.peek(other.digest) is not None
