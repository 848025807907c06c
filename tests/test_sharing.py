"""Small entries that share pages: where they go, what is freed, and what pins on a page hold back."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import count

import pytest
import torch

from braidsdk import Braid
from braidsdk.cache.pool import Pool
from braidsdk.cache.resident import Resident, State
from braidsdk.cache.shared import SharedPages
from braidsdk.errors import PoolFullError
from braidsdk.store.keys import EntryKey, ModelIdentity, sha256_of_tokens
from braidsdk.testing import FakeBraid

MODEL = ModelIdentity("w", "t", "float32", "none", 2, 1, 2, "{}")
PAGE = 128


def make_pool(pages: int, page_size: int = PAGE) -> Pool:
    return Pool(
        layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"),
        capacity_bytes=pages * 2 * 2 * page_size * 2 * 4, page_size=page_size,
    )  # fmt: skip


def key(name: object, tokens: int, level: int = 1) -> EntryKey:
    return EntryKey(MODEL, "default", f"{name}", level, tuple(range(tokens)), (), sha256_of_tokens(()))


_names = count()


def put(pool: Pool, *sizes: int, beside: int = 0) -> list[Resident]:
    """New entries with so many tokens, ready, without a pin."""
    made = list(pool.place([key(next(_names), tokens) for tokens in sizes], beside).values())
    for entry in made:
        entry.state = State.READY
        pool.unpin(entry)
    return made


def test_small_entries_share_pages_and_others_do_not() -> None:
    pool = make_pool(20)
    entries = put(pool, 22, 64, 1, 65, 33, 32, 128, 300)
    pool.integrity()
    small = [entry for entry in entries if entry.tokens <= PAGE // 2]
    assert sum(len(entry.pages) for entry in entries if entry not in small) == 1 + 1 + 3
    assert len({entry.page for entry in small}) == 2, "224 tokens of 7 blocks"
    assert pool.used_bytes == 7 * pool.page_bytes
    for entry in entries:
        segment = entry.at(1000)
        assert segment.stop - segment.start == entry.tokens
        assert segment.offset == segment.start == (entry.offset if entry in small else 0)
    assert [pool.bytes_for(tokens) * 4 // pool.page_bytes for tokens in (0, 1, 32, 33, 64, 65, 128, 129)] == [
        0, 1, 1, 2, 2, 4, 4, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("page_size", [4, 32, 48, 96])
def test_pages_that_are_no_power_of_two_of_blocks_are_not_shared(page_size: int) -> None:
    pool = make_pool(8, page_size)
    assert all(entry.blocks is None for entry in put(pool, 1, 2, 3))
    assert pool.used_bytes == 3 * pool.page_bytes


def test_free_blocks_side_by_side_become_one_and_an_empty_page_is_free() -> None:
    pool = make_pool(2)
    first, second, third, fourth = put(pool, 30, 30, 30, 30)
    assert [entry.offset for entry in (first, second, third, fourth)] == [0, 32, 64, 96]
    pool.drop(second)
    pool.drop(third)
    (other,) = put(pool, 60)
    assert other.page != first.page, "blocks 1 and 2 are side by side and of no pair"
    pool.drop(fourth)
    fuller, merged = put(pool, 64, 64)
    assert (fuller.page, fuller.offset) == (other.page, 64), "the page with fewer free blocks"
    assert (merged.page, merged.offset) == (first.page, 64)
    for entry in (first, other, fuller, merged):
        pool.integrity()
        pool.drop(entry)
    assert (pool.used_bytes, pool.room) == (0, 2)
    assert len(pool.take(2 * PAGE)) == 2


def test_a_page_with_a_pinned_entry_is_no_room_and_what_lies_beside_it_stays() -> None:
    pool = make_pool(3)
    pinned, beside = put(pool, 20, 20)
    put(pool, 128)
    pool.pin(pinned)
    assert pool.room == 2
    with pytest.raises(PoolFullError, match="running calls leave"):
        pool.take(3 * PAGE)
    with pytest.raises(PoolFullError, match="running calls leave"):
        pool.place([key("x", 3 * PAGE)])
    pages = pool.take(2 * PAGE)
    assert pool.find(beside.key), "evicting it would have freed no page"
    pool.integrity([pages])
    pool.unpin(pinned)
    assert pool.room == 1
    assert len(pool.take(PAGE)) == 1
    assert not pool.find(pinned.key)
    assert not pool.find(beside.key)


def test_small_entries_evict_the_least_recently_used_where_no_page_is_free() -> None:
    pool = make_pool(1)
    entries = put(pool, 20, 20, 20, 20)
    pool.pin(entries[0])
    pool.unpin(entries[0])
    (new,) = put(pool, 20)
    assert new.offset == entries[1].offset
    assert [pool.find(entry.key) is not None for entry in entries] == [True, False, True, True]


def test_an_entry_deleted_under_a_running_call_keeps_its_blocks_until_the_call_ends() -> None:
    pool = make_pool(1)
    gone, beside = put(pool, 20, 20)
    pool.pin(gone)
    pool.drop(gone)
    pool.integrity()
    assert pool.room == 0
    with pytest.raises(PoolFullError):
        pool.take(1)
    pool.unpin(gone)
    pool.integrity()
    assert pool.room == 1
    pool.drop(beside)
    assert pool.used_bytes == 0


def test_zeroing_an_entry_leaves_its_neighbours_alone() -> None:
    pool = make_pool(1)
    entries = put(pool, 20, 40, 32)
    pool.kv.fill_(float("nan"))
    for number, entry in enumerate(entries, start=1):
        pool.kv[:, :, entry.pages, :, entry.places] = number
    before = pool.kv.clone()
    pool.clear_padding(entries[0])
    pool.clear_padding(entries[2])
    at = entries[0].offset
    assert torch.all(pool.kv[:, :, 0, :, at : at + 20] == 1)
    assert torch.all(pool.kv[:, :, 0, :, at + 20 : at + 32] == 0)
    before[:, :, 0, :, at + 20 : at + 32] = 0
    assert torch.equal(pool.kv.nan_to_num(-1.0), before.nan_to_num(-1.0))
    pool.clear_entry(entries[1])
    before[:, :, 0, :, entries[1].places] = 0
    assert torch.equal(pool.kv.nan_to_num(-1.0), before.nan_to_num(-1.0))


@pytest.mark.parametrize("fault", ["block", "pins", "page", "count"])
def test_integrity_notices_what_is_wrong_on_a_shared_page(fault: str) -> None:
    pool = make_pool(3)
    entry, _ = put(pool, 20, 20)
    pool.integrity()
    if fault == "block":
        entry.blocks = range(1, 2)
    elif fault == "pins":
        pool._shared.pin(entry.page)
    elif fault == "page":
        pool._free.give([entry.page])
    else:
        pool._evictable -= 1
    with pytest.raises(RuntimeError, match="pool"):
        pool.integrity()


def test_more_turns_at_once_than_stay_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braidsdk.cache.pool.KEPT_TURNS", 2)
    pool = make_pool(8)
    turns = list(pool.place([key(name, 20, level=2) for name in "abcde"]).values())
    assert all(pool.find(turn.key) is turn for turn in turns)
    pool.integrity()


def fits(pool: Pool, held: list[torch.Tensor]) -> int:
    """Pages that can be taken, counted anew: those on which nothing is pinned or taken by a request."""
    kept = {int(page) for pages in held for page in pages}
    kept |= {int(page) for entry in pool._pins for page in entry.pages}
    return pool.capacity_pages - len(kept)


@pytest.mark.parametrize("page_size", [64, 128, 256])
def test_whatever_happens_all_that_there_is_room_for_gets_it(page_size: int) -> None:
    """Against a plain count: what fits by `needed` and `room` is placed, pages that come after it are there too, and
    no entry loses its memory to another one while it is resident."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it when the test fails)
    rng, pool, pins, held = random.Random(seed), make_pool(9, page_size), list[Resident](), list[torch.Tensor]()
    marks: dict[Resident, float] = {}
    seen = Counter[str]()
    for step in range(4000):
        seen[what := rng.choice(["place", "place", "pin", "unpin", "unpin", "drop", "give"])] += 1
        if what == "place":
            sizes = [rng.choice([1, 20, 32, 33, 60, 64, 65, 128, 200]) for _ in range(rng.randint(1, 9))]
            beside = rng.randint(0, 3)
            keys = [key((step, at), tokens) for at, tokens in enumerate(sizes)]
            if pool.needed(sizes) + beside > pool.room:
                with pytest.raises(PoolFullError):
                    pool.place(keys, beside)
                seen["refused"] += 1
            else:
                new = pool.place(keys, beside)
                assert [new[each].tokens for each in keys] == sizes
                if beside:
                    held.append(pool.take(beside * page_size))
                for entry in new.values():
                    entry.state, marks[entry] = State.READY, float(len(marks))
                    pool.kv[:, :, entry.pages, :, entry.places] = marks[entry]
                    pins.append(entry)
        elif what == "pin" and pool._entries:
            pins.append(rng.choice(list(pool._entries.values())))
            pool.pin(pins[-1])
        elif what == "unpin" and pins:
            pool.unpin(pins.pop(rng.randrange(len(pins))))
        elif what == "drop" and pool._entries:
            pool.drop(rng.choice(list(pool._entries.values())))
        elif what == "give" and held:
            pool.give_back(held.pop(rng.randrange(len(held))))
        pool.integrity(held)
        assert pool.room == fits(pool, held)
        for entry in {*pool._entries.values(), *pins}:
            assert torch.all(pool.kv[:, :, entry.pages, :, entry.places] == marks[entry])
    assert seen["refused"] > 50
    assert seen["place"] - seen["refused"] > 50


def test_small_entries_fill_fresh_pages_in_whatever_order_they_come() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it when the test fails)
    rng = random.Random(seed)
    for _ in range(300):
        sizes = [rng.choice([20, 50, 128]) for _ in range(rng.randint(1, 40))]
        pool = make_pool(4, 256)
        pages = pool.needed(sizes)
        if pages <= pool.capacity_pages:
            pool.place([key(at, tokens) for at, tokens in enumerate(sizes)], pool.room - pages)
            assert pool.room == pool.capacity_pages - pages


def test_blocks_that_are_full_are_not_looked_at() -> None:
    """Finding free blocks takes as long on many pages as on few."""
    shared = SharedPages(PAGE)
    for page in range(1000):
        shared.open(page)
        shared.take(page, range(4))
    assert not shared._with_gaps
    assert shared.find(1, pinned=False) is None
    shared.give(7, range(2, 3))
    assert shared.find(1, pinned=False) == (7, 2)
    assert shared.find(1, pinned=True) is None


def test_a_thousand_lines_take_less_than_twice_their_tokens(pool_of: Callable[[Braid], Pool]) -> None:
    read = list[str]()
    with FakeBraid(lambda _, texts: str(read.extend(texts) or "yes")) as braid:
        anchor = braid.register_system("You answer.")
        before = braid.stats().pool_used_bytes
        lines = braid.register_many([f"{n:03d}: a line of twenty" for n in range(1000)], anchor=anchor, progress=False)
        pool = pool_of(braid)
        tokens = sum(len(line.token_ids) for line in lines)
        assert braid.stats().pool_used_bytes - before <= 1.5 * tokens * pool.page_bytes / pool.page_size
        assert braid.ask("All of them?", chunks=lines).text == "yes"
        assert read[-1000:] == [f"{n:03d}: a line of twenty" for n in range(1000)]
