"""The cache of recent keys is bounded by bytes, and no cache of texts is bounded only by their number."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from braidsdk.prompt import lru
from braidsdk.prompt.history import Spoken, SpokenTurns
from braidsdk.prompt.layout import PromptLayout
from braidsdk.prompt.lru import LRU, Remembering
from braidsdk.testing import FakeLayout


def kept(cache: LRU[str, int]) -> list[str]:
    return list(cache._known)


def test_the_least_recently_used_goes_first() -> None:
    cache: LRU[str, int] = LRU(10)
    for number, key in enumerate("abc"):
        cache.put(key, number, 3)
    assert cache.get("a") == 0
    cache.put("d", 3, 3)
    assert kept(cache) == ["c", "a", "d"]
    assert cache.get("b") is None
    cache.put("e", 4, 9)
    assert kept(cache) == ["e"]


def test_a_value_takes_the_place_of_its_keys_old_one() -> None:
    cache: LRU[str, int] = LRU(10)
    for value in range(100):
        cache.put("a", value, 6)
    cache.put("b", 0, 4)
    assert kept(cache) == ["a", "b"]
    assert cache.get("a") == 99


def test_what_is_larger_than_the_bound_is_not_kept_and_drops_nothing_else() -> None:
    cache: LRU[str, int] = LRU(10)
    cache.put("a", 1, 5)
    cache.put("b", 1, 10)
    cache.put("b", 2, 11)
    assert cache.get("b") is None, "the old value is not the key's any more"
    cache.put("a", 1, 5)
    cache.put("c", 1, 11)
    assert kept(cache) == ["a"]


def test_threads_leave_the_sum_of_bytes_right() -> None:
    cache: LRU[int, int] = LRU(500)

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2000):
            key = rng.randrange(60)
            if cache.get(key) is None:
                cache.put(key, key, rng.randrange(1, 40))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert cache._bytes == sum(nbytes for _, nbytes in cache._known.values()) <= 500


def test_a_recent_text_is_not_encoded_again() -> None:
    encoded: list[str] = []

    def encode(text: str) -> tuple[int, ...]:
        encoded.append(text)
        return (1, 2)

    remembered = Remembering(encode)
    assert remembered("a") == remembered("a") == (1, 2)
    assert encoded == ["a"]


@pytest.fixture(params=["a tokenizer's", "the fake's"])
def layout(request: pytest.FixtureRequest, random_checkpoint: Path) -> PromptLayout:
    return FakeLayout() if request.param == "the fake's" else PromptLayout(random_checkpoint)


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each cache held, after each value that was put into one; the bound is 50,000."""
    held: list[int] = []
    put = LRU.put

    def watched(self: LRU[object, object], key: object, value: object, nbytes: int) -> None:
        self._bound_bytes = 50_000
        put(self, key, value, nbytes)
        held.append(self._bytes)

    monkeypatch.setattr(lru.LRU, "put", watched)
    return held


def test_encoded_texts_are_bounded_by_bytes(layout: PromptLayout, bounds: list[int]) -> None:
    for number in range(50):
        layout.plain_ids(f"text {number} " * 30)
    assert len(bounds) >= 50
    assert 30_000 < max(bounds) <= 50_000


def test_spoken_turns_are_bounded_by_bytes(bounds: list[int]) -> None:
    turns = SpokenTurns()
    spoken = Spoken(tuple(range(100)), 99)
    for number in range(50):
        turns.remember((number,) * 100, f"answer {number}", spoken)
    assert len(bounds) == 50
    assert 30_000 < max(bounds) <= 50_000
    assert turns.recall((49,) * 100, "answer 49") is spoken
    assert turns.recall((0,) * 100, "answer 0") is None
