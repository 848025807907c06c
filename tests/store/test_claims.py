"""Which entries a process computes: one has the claim, and it ends with its owner."""

import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braidsdk.store import ChunkStore
from braidsdk.store.claims import Claims

OWNER = """
import sys
from braidsdk.store import ChunkStore
from conftest import make_key
store = ChunkStore(sys.argv[1])
claims = store.claims.begin().__enter__()
print(claims.take([make_key(None), make_key(None, level=0)]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(folder: Path) -> Any:
    """Another process, which has claimed two entries."""
    command = [sys.executable, "-c", OWNER, str(folder)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "[True, True]\n"
    with process:  # closes its pipes
        yield process
        process.kill()


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_a_claim_of_another_process_ends_with_it(
    store: ChunkStore, owner: subprocess.Popen[str], make: Any, end: str
) -> None:
    keys = [make.key(None), make.key(None, level=0), make.key(None, level=2)]
    with store.claims.begin() as claims:
        assert claims.take(keys) == [False, False, True]
        claims.release(keys)
        owner.kill() if end == "killed" else owner.stdin.close()  # type: ignore[union-attr]
        owner.wait()
        assert claims.take(keys) == [True, True, True]


def test_jobs_of_one_store_and_stores_of_one_process_claim_against_each_other(folder: Path, make: Any) -> None:
    key, other = make.key(None), make.key(None, level=0)
    with ChunkStore(folder) as one, ChunkStore(folder) as two:
        with one.claims.begin() as first, one.claims.begin() as second, two.claims.begin() as third:
            assert first.take([key, key]) == [True, False]
            assert second.take([key, other]) == [False, True]
            assert third.take([key, other]) == [False, False]
            second.release([key, other])
            assert third.take([key, other]) == [False, True]
        with one.claims.begin() as first:
            assert first.take([key, other]) == [True, True], "claims end with their job"


def test_without_locks_every_claim_is_granted(folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    with ChunkStore(folder) as one, ChunkStore(folder) as two:
        monkeypatch.setattr(fcntl, "fcntl", refuse)
        with one.claims.begin() as first, two.claims.begin() as second:
            assert first.take([make.key(None)]) == second.take([make.key(None)]) == [True]
    with Claims(None).begin() as claims:
        assert claims.take([make.key(None)]) == [True]


def test_a_job_that_fails_leaves_no_claim(store: ChunkStore, make: Any) -> None:
    def fail(of: Callable[[], Any]) -> None:
        with of() as claims:
            claims.take([make.key(None)])
            raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^$"):
            fail(store.claims.begin)
    with store.claims.begin() as claims:
        assert claims.take([make.key(None)]) == [True]
