"""Several processes register the same texts: each is computed once."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from braidsdk import Braid
from braidsdk.errors import StoreFullError
from braidsdk.store import ChunkStore
from braidsdk.testing import FakeBraid

RULES = "You answer from the documents."
TEXTS = [f"Text number {number}, which is not long." for number in range(12)]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The digests of all entries that were computed and written."""
    digests: list[str] = []
    publish = ChunkStore.publish

    def spied(store: ChunkStore, publications: list[tuple[object, ...]]) -> None:
        digests.extend(key.digest for key, _, _ in publications)  # type: ignore[attr-defined]
        publish(store, publications)  # type: ignore[arg-type]

    monkeypatch.setattr(ChunkStore, "publish", spied)
    return digests


def register(braid: Braid) -> None:
    anchor = braid.register_system(RULES)
    braid.register_many(TEXTS, anchor=anchor, progress=False)


def test_braids_that_register_the_same_texts_at_once_compute_each_once(tmp_path: Path, written: list[str]) -> None:
    """Their stores are apart, as those of processes."""
    braids = [FakeBraid({}, store=tmp_path) for _ in range(6)]
    gate, errors = threading.Barrier(len(braids)), []

    def run(braid: Braid) -> None:
        gate.wait()
        try:
            register(braid)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(braid,)) for braid in braids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for braid in braids:
        assert braid.stats().entries == 1 + len(TEXTS)
        braid.close()
    assert errors == []
    assert len(written) == len(set(written)) == 1 + len(TEXTS)


def test_what_another_claims_is_taken_over_when_it_fails_and_not_computed_when_it_is_stored(
    tmp_path: Path, written: list[str]
) -> None:
    with FakeBraid({}, store=tmp_path) as other, FakeBraid({}, store=tmp_path) as mine:
        anchor = other.register_system(RULES)
        chunks = other.register_many(TEXTS[:2], progress=False)
        composition = other.compose([anchor, *chunks])
        keys = composition._keys[-2:]
        seen: list[int] = []
        with other._engine.store.claims.begin() as claims:
            assert claims.take(keys) == [True, True]
            written.clear()
            waiting = threading.Thread(
                target=lambda: mine.register_many(
                    TEXTS, anchor=anchor, progress=False, on_progress=lambda now: seen.append(now.done_chunks)
                )
            )
            waiting.start()
            waiting.join(1.0)
            assert waiting.is_alive(), "two of its texts are claimed"
            assert len(written) == len(TEXTS) - 2, "it goes on with the others meanwhile"
            composition.prepare()  # computes and stores both, without a claim
            claims.release(keys[:1])
            waiting.join(60)
        assert not waiting.is_alive()
        assert seen[0] == 0
        assert seen[-1] == len(TEXTS)
        assert len(written) == len(set(written)) == len(TEXTS)


def test_a_registration_that_fails_leaves_no_claim(
    tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreFullError("The disk is full.")

    with FakeBraid({}, store=tmp_path) as braid:
        with monkeypatch.context() as patch:
            patch.setattr(ChunkStore, "publish", full)
            with pytest.raises(StoreFullError):
                register(braid)
        register(braid)
    assert len(written) == 1 + len(TEXTS)
