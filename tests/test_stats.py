"""What a call would take and what it took, and what a store holds and how it served."""

from pathlib import Path

import pytest

from braidsdk import Braid, Explanation
from braidsdk.cache.rates import KEPT, Rates
from braidsdk.errors import StoreError
from braidsdk.store import ChunkStore, counters
from braidsdk.testing import FakeBraid
from braidsdk.types import milliseconds, size

RULES = "You answer questions from the documents."
LONG = [f"{'word ' * 300}{n}" for n in range(3)]


def test_an_explanation_expects_what_the_call_then_does(random_checkpoint: Path, tmp_path: Path) -> None:
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        assert braid.compose([]).explain().expected_ms is None, "nothing was measured yet"
        rules = braid.register_system(RULES)
        stored = braid.register(LONG[0], anchor=rules)
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        missing = braid.register(LONG[1])
        context = braid.compose([rules, stored, missing])
        first = context.explain()
        assert [row.where for row in first.chunks] == ["store", "store", "nowhere"]
        assert (first.hits, first.misses) == (2, 1)
        assert [row.expected_ms for row in first.chunks][:2] == [None, None], "nothing was loaded yet"
        assert first.chunks[2].expected_ms
        assert first.expected_load_ms is None
        assert first.expected_compute_ms == first.chunks[2].expected_ms
        answer = context.ask("Well?", max_new_tokens=2)
        assert answer.usage.cached_tokens == first.cached_tokens
        assert answer.timings.compute_ms > 0
        assert answer.timings.prefill_ms > answer.timings.compute_ms
        second = context.explain()
        assert second.expected_ms == 0.0, "all of it is in memory"
        assert second.kv_bytes == sum(row.kv_bytes for row in second.chunks)
        again = context.ask("Well?", max_new_tokens=2)
        assert again.timings.compute_ms < answer.timings.compute_ms
        table = [line.split() for line in first.beside(answer).splitlines()]
        question = len(answer.prompt_ids) - len(context.input_ids)
        assert table[0] == ["expected", "real"]
        assert table[1] == ["cached", "tokens", *[str(first.cached_tokens)] * 2]
        assert table[2] == ["computed", "tokens", *[str(first.missing_tokens + question)] * 2]
        assert table[3][:2] == ["load", "-"]
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu") as braid:
        third = braid.compose([rules, stored, missing]).explain()
        assert all(row.expected_ms for row in third.chunks), "rates are remembered"
        assert third.expected_ms == third.expected_load_ms


def test_an_explanation_in_words(random_braid: Braid) -> None:
    rules = random_braid.register_system(RULES, name="rules")
    words = str(random_braid.compose([rules, random_braid.register(LONG[0], name="doc")]).explain()).splitlines()
    assert words[0].startswith("anchored: ")
    assert words[0].endswith("tokens cached, 603 to compute")
    assert words[1].endswith("0.0 ms hit  rules: in memory")
    assert words[2].endswith("ms miss doc: never computed in this store")
    assert "kB" in words[2]


def test_statistics_of_a_store_and_of_how_it_served(random_checkpoint: Path, tmp_path: Path) -> None:
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu", pool_bytes=50_000_000) as braid:
        rules = braid.register_system(RULES)
        documents = braid.register_many(LONG[:2], anchor=rules, progress=False)
        other = braid.register(LONG[2])
        stats = braid.stats()
        assert (stats.hits, stats.misses, stats.all_hits, stats.all_misses) == (0, 0, 0, 0), "registering is neither"
        braid.ask("Well?", chunks=[rules, *documents, other], max_new_tokens=1)
        stats = braid.stats()
        assert (stats.hits, stats.misses) == (3, 1)
        assert (stats.chunks, stats.entries, stats.damaged) == (4, 4, 0)
        assert [(g.model, g.dtype, g.level, g.entries) for g in stats.groups] == [
            (str(random_checkpoint), "float32", 0, 1),
            (str(random_checkpoint), "float32", 1, 3),
        ]
        assert sum(group.bytes for group in stats.groups) == stats.bytes
        assert stats.bytes <= stats.pool_used_bytes <= stats.pool_capacity_bytes <= 50_000_000
        braid.ask("Well?", chunks=[rules, *documents, other], max_new_tokens=1)
        assert braid.stats().hits == 7
    with Braid(random_checkpoint, store=tmp_path / "s", device="cpu", dtype="bfloat16") as braid:
        assert (braid.stats().hits, braid.stats().all_hits, braid.stats().all_misses) == (0, 7, 1)
        braid.compose([rules]).prepare()
        assert (braid.stats().misses, braid.stats().all_misses) == (1, 2)
        assert len(braid.stats().groups) == 3
        words = str(braid.stats())
        assert "4 chunks, 5 stored KV entries" in words
        assert "0 hits and 1 miss since it was opened; 7 and 2 in all" in words
    with ChunkStore(tmp_path / "s") as store:
        assert store.recall(counters("default")) == {"hits:default": "7", "misses:default": "2"}


def test_counts_that_cannot_be_kept_do_not_keep_a_braid_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeBraid() as braid:
        braid.ask("Well?", chunks=[braid.register("text")])
        monkeypatch.setattr(ChunkStore, "remember", failing)
    with pytest.raises(Exception, match="closed"):
        braid.stats()


def failing(*_: object, **__: object) -> None:
    raise StoreError("out of luck")


def test_a_rate_is_that_of_the_latest_measurements() -> None:
    rates = Rates("me", {})
    assert rates.per_s("compute") is rates.seconds_for("compute", 10) is None
    assert rates.changed() == {}
    rates.add("compute", 0, 1.0)
    rates.add("compute", 10, 0.0)
    assert rates.per_s("compute") is None
    rates.add("compute", 100, 1.0)
    rates.add("compute", 300, 1.0)
    assert rates.per_s("compute") == 200
    assert rates.seconds_for("compute", 50) == 0.25
    later = Rates("me", rates.changed())
    assert (later.per_s("compute"), later.amount("compute"), later.per_s("load")) == (200, 400, None)
    assert Rates("you", rates.changed()).per_s("compute") is None
    for _ in range(KEPT):
        later.add("compute", 50, 1.0)
    assert later.per_s("compute") == 50


SIZES = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 123_456: "123 kB", 99_900_000: "99.9 MB", 10**12: "1,000.0 GB"}


@pytest.mark.parametrize(("count", "words"), SIZES.items())
def test_sizes_in_words(count: int, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(("time", "words"), [(None, "-"), (0.04, "0.0 ms"), (99.94, "99.9 ms"), (1234.5, "1,234 ms")])
def test_times_in_words(time: float | None, words: str) -> None:
    assert milliseconds(time) == words


def test_an_empty_explanation_expects_nothing() -> None:
    assert Explanation("exact", (), ()).expected_ms == 0


def test_usage_tells_exact_tokens_from_composed_ones_and_what_is_stored(random_braid: Braid) -> None:
    rules = random_braid.register_system(RULES)
    docs = [random_braid.register(each) for each in LONG]
    sizes = [len(each.token_ids) for each in (rules, *docs)]
    first = random_braid.ask("Well?", chunks=[rules, *docs], max_new_tokens=1).usage
    assert (first.exact_tokens, first.stored_tokens) == (sizes[0], sum(sizes[1:]))
    second = random_braid.ask("Well?", chunks=[rules, *docs], max_new_tokens=1).usage
    assert (second.exact_tokens, second.stored_tokens) == (sizes[0] + sizes[1], 0), (
        "the first document follows the rules"
    )
    assert second.cached_tokens == sum(sizes)
    other = random_braid.ask("Well?", chunks=[rules, docs[1], docs[0]], max_new_tokens=1).usage
    assert (other.exact_tokens, other.cached_tokens) == (sizes[0] + sizes[2], sizes[0] + sizes[1] + sizes[2])
    for wanted in ((sizes[0] + sizes[1], 0), (sum(sizes), 0)):  # the chain is computed once, and not kept
        usage = random_braid.ask("Well?", chunks=[rules, *docs], mode="exact", max_new_tokens=1).usage
        assert (usage.exact_tokens, usage.stored_tokens) == wanted
    alone = random_braid.ask("Well?", chunks=[docs[0]], mode="isolated", keep=False, max_new_tokens=1).usage
    assert (alone.exact_tokens, alone.stored_tokens) == (0, 0), "nothing was there"


def test_timings_tell_the_time_in_the_queue(random_braid: Braid) -> None:
    timings = random_braid.ask("Well?", chunks=[random_braid.register_system(RULES)], max_new_tokens=2).timings
    assert 0 < timings.queue_ms <= timings.first_token_ms - timings.load_ms


@pytest.mark.parametrize("mode", ["linked(4)", "guided(0.5)", "blended(0.5)", "random(0.5)"])
@pytest.mark.parametrize("system", [True, False])
def test_a_token_that_is_computed_and_then_repaired_counts_once(mode: str, system: bool, random_braid: Braid) -> None:
    chunks = [random_braid.register_system(RULES)] if system else []
    chunks += [random_braid.register(each) for each in LONG]
    cold, warm = (random_braid.ask("Well?", chunks=chunks, mode=mode, max_new_tokens=1).usage for _ in range(2))
    tail = warm.computed_tokens
    for usage in (cold, warm):
        assert usage.prompt_tokens == usage.cached_tokens + usage.computed_tokens + usage.repaired_tokens
        assert 0 <= usage.exact_tokens <= usage.cached_tokens
    assert cold.repaired_tokens == warm.repaired_tokens > 0
    assert cold.cached_tokens == (len(chunks[0].token_ids) if system else 0), "only a system prompt was there"
    assert cold.computed_tokens == cold.stored_tokens + tail - cold.repaired_tokens
    assert warm.stored_tokens == 0
