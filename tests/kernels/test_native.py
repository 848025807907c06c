"""C kernels: what compiles them, where they are kept, and the threads that they run on."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from braidsdk.kernels import native

needs_native = pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))

COUNT = """
#include "vectors.h"
typedef struct { int32_t *seen, *threads; float *out; const float *in; } Arguments;
void count(void *pointer, int thread, int threads) {
    Arguments *given = pointer;
    given->seen[thread]++;
    *given->threads = threads;
    for (int i = 0; !thread && i < 16; i += LANES) store(given->out + i, exponential(load(given->in + i)));
}
"""


class Arguments(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("seen", "threads", "out", "given"))


def run(source: Path, threads: int, given: torch.Tensor) -> tuple[list[int], int, torch.Tensor]:
    """Visits of each thread, threads of the team, and the exponentials of 16 numbers."""
    seen, team = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = torch.empty_like(given)
    arguments = Arguments(*(tensor.data_ptr() for tensor in (seen, team, out, given)))
    native.parallel(native.library(source).count, arguments, threads)
    return seen.tolist(), int(team), out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "count.c"
    file.write_text(COUNT)
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "braidsdk" / "native"


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_thread_of_the_team_runs_once(source: Path, threads: int) -> None:
    seen, team, _ = run(source, threads, torch.zeros(16))
    assert seen == [1] * team + [0] * (4 - team)
    assert 1 <= team <= threads


@needs_native
def test_the_exponential_is_exact_to_float32s_last_digits(source: Path, level: native.Level) -> None:
    for start in range(-100, 88, 4):
        given = torch.linspace(start, start + 4, 16)
        torch.testing.assert_close(run(source, 1, given)[2].double(), given.double().exp(), rtol=3e-7, atol=1e-38)
    edge = torch.tensor([float("-inf"), -1e30, -105.0, 0.0, float("nan")]).repeat(4)[:16]
    assert torch.equal(run(source, 1, edge)[2].nan_to_num(7.0), torch.tensor([0.0, 0.0, 0.0, 1.0, 7.0]).repeat(4)[:16])


@needs_native
def test_what_was_compiled_is_kept_until_its_source_changes(source: Path, cache: Path) -> None:
    def load() -> None:
        code = (
            f"from braidsdk.kernels import native; import pathlib; native.library(pathlib.Path({str(source)!r})).count"
        )
        subprocess.run([sys.executable, "-P", "-c", code], check=True)

    load()
    (first,) = cache.glob("*.so")
    written = first.stat().st_mtime_ns
    load()
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [written]
    source.write_text(COUNT + "\n")
    load()
    assert len(list(cache.glob("*.so"))) == 2


@needs_native
@pytest.mark.parametrize("left", [0, 5000])
def test_a_damaged_file_is_compiled_again(source: Path, cache: Path, left: int) -> None:
    native.library.__wrapped__(source)
    (kept,) = cache.glob("*.so")
    whole = kept.read_bytes()
    kept.unlink()  # it is loaded here
    kept.write_bytes(whole[:left])
    assert native.library.__wrapped__(source).count
    assert kept.read_bytes() == whole


@needs_native
def test_a_folder_that_others_could_write_to_is_refused(source: Path, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o777)
    with pytest.raises(RuntimeError, match="others could write"):
        native.library.__wrapped__(source)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CC": "no-such-compiler"}, "'no-such-compiler' of $CC was not found"),
        ({"CC": "", "PATH": ""}, "no C compiler; install gcc"),
        ({"CC": "false"}, "can't compile native.c"),
        ({"CC": "gcc '"}, "quotation"),
        ({"XDG_CACHE_HOME": "/dev/null/x"}, "set XDG_CACHE_HOME"),
    ],
)
def test_an_obstacle_says_what_to_do(environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_obstacle", lambda: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native.library.cache_clear()
    try:
        assert said in str(native.obstacle.__wrapped__())
    finally:
        native.library.cache_clear()


def test_a_cpu_without_the_lowest_level_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LEVELS", (native.Level("tomorrow", ("fma", "avx_of_tomorrow")),))
    native.levels.cache_clear()
    try:
        assert "this CPU lacks fma or avx_of_tomorrow" in str(native.cpu_obstacle.__wrapped__())
    finally:
        native.levels.cache_clear()


def test_levels_are_sorted_and_each_has_what_the_next_one_has() -> None:
    for better, worse in zip(native.LEVELS, native.LEVELS[1:], strict=False):
        assert set(worse.features) < set(better.features)
