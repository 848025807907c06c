"""The paged pool: pages, eviction, pins, deletion under a running call."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import psutil
import pytest
import torch

from braidsdk import Braid
from braidsdk.cache.free import FreePages, runs_of
from braidsdk.cache.pool import Pool
from braidsdk.cache.resident import Resident, State
from braidsdk.errors import PoolFullError
from braidsdk.kernels.attention import cascade_attention, plan_attention
from braidsdk.kernels.paging import PagedSegment, Request, append, slots_of
from braidsdk.kernels.rope import RotaryTable
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
    return pool.add(Resident(entry_key, pool.take(len(entry_key.token_ids)), state=State.READY))


def test_a_pool_takes_only_the_memory_that_is_written_to() -> None:
    before = psutil.Process().memory_info().rss
    pool = Pool(
        layers=2, kv_heads=8, head_dim=128, dtype=torch.float32, device=torch.device("cpu"), capacity_bytes=2**34
    )
    assert pool.kv.nbytes > 2**33
    assert psutil.Process().memory_info().rss - before < 2**30


def test_cleared_pages_are_zero() -> None:
    pool = make_pool(2)
    pages = pool.take(2 * PAGE)
    pool.kv[:, :, pages] = 1.0
    pool.give_back(pages)
    again = pool.take(2 * PAGE)
    pool.clear(again)
    assert torch.all(pool.kv[:, :, again] == 0.0)


def test_the_least_recently_used_entry_makes_room() -> None:
    pool = make_pool(3)
    entries = [put(pool, key(name)) for name in "abc"]
    pool.pin(entries[0])
    pool.unpin(entries[0])
    pool.find(entries[1].key)  # looking is no use
    pool.take(1)
    assert [pool.find(each.key) is not None for each in entries] == [True, False, True]


def test_pinned_entries_stay_and_exhaustion_is_a_typed_error() -> None:
    pool = make_pool(3)
    entries = [put(pool, key(name)) for name in "ab"]
    for entry in entries:
        pool.pin(entry)
    assert pool.room == 1
    with pytest.raises(PoolFullError, match="running calls leave"):
        pool.take(2 * PAGE)
    assert all(pool.find(entry.key) for entry in entries)
    for entry in entries:
        pool.unpin(entry)
    assert pool.room == 3
    pages = pool.take(2 * PAGE)
    pool.integrity([pages])


def test_an_entry_deleted_under_a_running_call_keeps_its_pages_until_the_call_ends() -> None:
    pool = make_pool(1)
    entry = put(pool, key("a"))
    pool.pin(entry)
    pool.drop_chunks({"a" * 32})
    assert pool.find(entry.key) is None
    pool.integrity()
    with pytest.raises(PoolFullError):
        pool.take(1)
    pool.unpin(entry)
    assert pool.take(1).tolist() == entry.pages.tolist()


@pytest.mark.parametrize("fault", ["lost", "twice", "count", "loading"])
def test_integrity_notices_what_is_wrong(fault: str) -> None:
    pool = make_pool(3)
    entry = put(pool, key("a"))
    pool.integrity()
    if fault == "lost":
        pool._free.take(1)
    elif fault == "twice":
        pool._free.give(entry.pages[:1].tolist())
    elif fault == "count":
        pool._evictable += 1
    else:
        entry.state = State.LOADING
    with pytest.raises(RuntimeError, match="pool"):
        pool.integrity()


def test_dropping_a_chunk_drops_what_was_computed_with_sight_of_it() -> None:
    pool = make_pool(4)
    seen, other = key("b", after=("a" * 32,)), key("c", after=("b" * 32,))
    for each in (key("a"), seen, other):
        put(pool, each)
    pool.drop_chunks({"a" * 32})
    assert pool.find(seen) is None
    assert pool.find(other) is not None


def test_what_can_never_fit_is_said_before_anything_happens() -> None:
    pool = make_pool(3)
    pool.check_fits([PAGE, PAGE, 1])
    with pytest.raises(PoolFullError, match="larger pool_bytes"):
        pool.check_fits([PAGE, PAGE, PAGE + 1])


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
    assert pool.kv[0].numel() > 2**31
    torch.manual_seed(0)
    keys, values = torch.randn(2, 100, kv_heads, head_dim).bfloat16()
    rotary = RotaryTable(torch.rand(head_dim // 2), 1.0, torch.float32, torch.device("cpu"))
    outs = []
    for _ in range(2):
        mine = pool.take(100)
        pool.clear(mine)
        append(pool.kv[0], slots_of(mine, torch.arange(100), page_size), keys, values)
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
        assert int(mine.max()) in (1, pages - 1)
        pool._free.take(max(0, len(pool._free) - 2))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def test_of_past_turns_only_the_latest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braidsdk.cache.pool.KEPT_TURNS", 2)
    pool = make_pool(100)
    turns = [replace(key(name), level=2, chunk_id=None, after_sha256=name) for name in "abcdefgh"]
    document = put(pool, key("d"))
    for each in turns:
        put(pool, each)
    assert pool.find(document.key)
    assert [pool.find(each) is not None for each in turns] == [False] * 6 + [True] * 2
    assert pool.used_bytes == 3 * pool.page_bytes


def test_more_memory_than_there_is_is_a_typed_error() -> None:
    with pytest.raises(PoolFullError, match="smaller pool_bytes"):
        make_pool(2**60 // (2 * 2 * 1 * PAGE * 8 * 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lies_in_unused_memory_never_matters(
    random_checkpoint: Path, tmp_path: Path, pool_of: Callable[[Braid], Pool], dtype: str
) -> None:
    found = []
    for index, filling in enumerate((0.0, float("nan"))):
        for _ in ("computed", "loaded"):
            with Braid(
                random_checkpoint, store=tmp_path / str(index), device="cpu", dtype=dtype, pool_bytes=2**26
            ) as braid:
                pool_of(braid).kv.fill_(filling)
                texts = [f"Oslo is cold. Rome is warm. {'So it is said. ' * n}" for n in (1, 9, 40)]
                chunks = braid.register_many(texts, anchor=braid.register_system("You answer."), progress=False)
                answer = braid.ask("Where?", chunks=chunks, max_new_tokens=12)
                again = braid.ask("And where else?", chunks=chunks[:1], max_new_tokens=12)
                found.append((answer.token_ids, again.token_ids))
    assert all(each == found[0] for each in found)


def test_free_pages_are_given_out_once_and_together_where_they_can_be() -> None:
    rng, free, held = random.Random(0), FreePages(60), []
    for _ in range(3000):
        wanted = rng.randint(1, 6)
        if len(free) >= wanted and rng.random() < 0.6:
            longest = max((stop - start for start, stop in runs_of(list(free))), default=0)
            pages = free.take(wanted)
            assert len(runs_of(pages)) == 1 or longest < wanted
            held.append(pages)
        elif held:
            free.give(held.pop(rng.randrange(len(held))))
        assert sorted([*free, *chain.from_iterable(held)]) == list(range(60))
        assert len(free) == len(list(free))
    for pages in held:
        free.give(pages[::-1])
    assert free.take(60) == list(range(60))
    assert free.take(0) == list(free) == []
