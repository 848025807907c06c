"""What a name stood for before, `chunks.history` and `chunks.restore`; pins; limits of the store."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from braidsdk.errors import InputError, UnknownChunkError
from braidsdk.store import ChunkStore, Limit
from braidsdk.testing import FakeBraid


def test_a_name_that_moves_keeps_its_history() -> None:
    started = datetime.now(UTC)
    with FakeBraid() as braid:
        first, second = (braid.register(f"Edition {n}.", name="guide", replace=True) for n in (1, 2))
        before = braid.compose([first])
        found = braid.chunks.history("guide")
        assert [version.chunk for version in found] == [second, first]
        assert started <= found[1].since <= found[0].since == found[1].until <= datetime.now(UTC)
        assert found[0].until is None
        assert braid.chunks.restore("guide") == first
        assert braid.chunks.get("guide") == first
        assert [version.chunk for version in braid.chunks.history("guide")] == [first, second, first]
        assert braid.chunks.restore("guide", second.id) == braid.chunks.get("guide") == second
        assert before.ask("Which edition?").text, "a composition goes on with the text it was made of"
        braid.chunks.delete(first)
        assert {version.chunk for version in braid.chunks.history("guide")} == {second}


def test_unknown_names_and_versions_are_refused() -> None:
    with FakeBraid() as braid:
        one = braid.register("One.", name="guide")
        with pytest.raises(UnknownChunkError, match="Did you mean 'guide'"):
            braid.chunks.history("guide1")
        with pytest.raises(UnknownChunkError, match="no other is known"):
            braid.chunks.restore("guide")
        with pytest.raises(UnknownChunkError, match="must have stood for chunk"):
            braid.chunks.restore("guide", braid.register("Two."))
        for wrong in (("guide", 3), (3, None)):
            with pytest.raises(InputError, match="takes a name"):
                braid.chunks.restore(*wrong)  # type: ignore[arg-type]
        assert braid.chunks.get("guide") == one


def test_a_pin_is_kept_and_taken_away() -> None:
    with FakeBraid() as braid:
        chunk = braid.register("One.", name="guide")
        assert not chunk.pinned
        assert braid.chunks.update(chunk, pinned=True).pinned
        assert braid.register("One.").pinned, "to register it again does not change it"
        assert braid.chunks.get("guide").pinned
        assert not braid.chunks.update("guide", pinned=False).pinned


def test_a_limit_evicts_caches_and_answers_stay_the_same(tmp_path: Path) -> None:
    with FakeBraid(store=tmp_path / "store") as braid:
        rules = braid.register_system("Answer.")
        chunks = [braid.register(f"Text {n}.", anchor=rules) for n in range(4)]
        before = braid.ask("Well?", chunks=[rules, *chunks]).text
        braid.chunks.update(chunks[0], pinned=True)
        braid.limit_store(max_bytes=0)
        assert 1 <= braid.stats().entries <= 2
        assert braid.ask("Well?", chunks=[rules, *chunks]).text == before
        with pytest.raises(InputError, match="at least 0"):
            braid.limit_store(max_age_days=-1)
        braid.limit_store(max_age_days=30)
        with ChunkStore(tmp_path / "store") as store:
            assert store.limits() == {"default": Limit(max_age_s=30 * 86_400)}
        braid.limit_store(whole_store=True)
    with FakeBraid(store=tmp_path / "store") as braid:
        assert braid.ask("Well?", chunks=[rules, *chunks]).text == before
