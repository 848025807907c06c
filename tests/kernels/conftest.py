"""What the kernels' tests share: the device, dtypes, poisoned outputs, and how far from the truth is too far.

Where there is no GPU, kernels run in Triton's interpreter, which gets bfloat16 wrong: that dtype is the GPU's.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.attention import native as native_attention
from braidsdk.kernels.launch import Tiles
from braidsdk.kernels.products import native as native_products

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic mode

CUDA = torch.cuda.is_available()
FENCE = 8192
"""Numbers on either side of a tensor, more than any kernel loads at once from a row; it keeps addresses aligned."""
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def tiles_of() -> Callable[[int, Tiles], Tiles]:
    """A table of tiles with nothing but the entries for so many rows."""

    def tiles_of(rows: int, tiles: Tiles) -> Tiles:
        return {
            kind: {size: {rows: by_rows[rows]} for size, by_rows in by_columns.items()}
            for kind, by_columns in tiles.items()
        }

    return tiles_of


@pytest.fixture
def seed() -> int:
    """A fresh seed, set, and shown when the test fails."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")  # noqa: T201 (pytest shows it when the test fails)
    return seed


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN until they are written: torch's deterministic mode sees to it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fenced() -> Callable[[Tensor], Tensor]:
    """Copies a tensor to where NaN lies right before and right behind it: a read past its ends shows."""

    def fence(tensor: Tensor) -> Tensor:
        space = torch.full((tensor.numel() + 2 * FENCE,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        inside = space[FENCE : FENCE + tensor.numel()].view(tensor.shape)
        return inside.copy_(tensor)

    return fence


@pytest.fixture
def assert_near() -> Callable[[Tensor, Tensor, torch.dtype], None]:
    """Assert that a result in `dtype` is where rounding alone could have put it.

    Operands are rounded a few times on the way, each by eps / 2 at most; over a sum these average out to about one eps
    of the result's root mean square, and eight leave room for the largest of many thousand. In float32 it is the sums
    that err, more with their length: sixty-four.
    """

    def check(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
        truth = truth.to(got.device)
        steps = 64 if dtype == torch.float32 else 8
        room = steps * torch.finfo(dtype).eps * (truth.abs() + truth.square().mean().sqrt())
        worst = ((got.double() - truth).abs() / room).max()
        assert worst <= 1, f"{worst:.3g} times as far as {dtype} allows"  # NaN is not <= 1

    return check


@pytest.fixture
def assert_as_good() -> Callable[..., None]:
    """Assert that ours is as close to the truth as torch's own path, over twelve seeds.

    The statistic is the ratio of RMS errors: 1.05 at most in the geometric mean, and none above `largest`.
    """

    def check(results: Callable[[], tuple[Tensor, Tensor, Tensor]], largest: float = 1.10) -> None:
        ratios = []
        for seed in range(12):
            torch.manual_seed(seed)
            ours, theirs, truth = (each.double() for each in results())
            ratios.append((ours - truth).square().mean().sqrt() / (theirs - truth).square().mean().sqrt())
        stacked = torch.stack(ratios)
        mean = stacked.log().mean().exp()
        assert mean <= 1.05, f"geometric mean {mean:.3f}"
        assert stacked.max() <= largest, f"largest {stacked.max():.3f}"

    return check


class EmulatedTiles(native.Level):
    """AMX where there is none: its tiles are plain C."""

    @property
    def flags(self) -> tuple[str, ...]:
        header = Path(__file__).with_name("emulated_tiles.h")
        (bf16,) = (level for level in native.LEVELS if level.name == "avx512_bf16")
        version = f"-DVERSION={zlib.crc32(header.read_bytes())}"  # a changed header is another kernel
        return (*bf16.flags, "-D__AMX_BF16__", "-include", str(header), version)


def _levels() -> tuple[native.Level, ...]:
    if native.obstacle():
        return ()
    names = [level.name for level in native.levels()]
    emulated = (EmulatedTiles("amx", ()),) if "amx" not in names and "avx512_bf16" in names else ()
    return *native.levels(), *emulated


LEVELS = _levels()


@pytest.fixture(scope="module", params=LEVELS, ids=lambda level: level.name)
def level(request: pytest.FixtureRequest) -> Iterator[native.Level]:
    """Each level of C kernels that this machine can run, in place of the best."""
    caches = native.library, native.obstacle, native._starter, native_products._library, native_attention._library

    def clear() -> None:
        for each in caches:
            each.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", lambda: request.param)
        clear()
        yield request.param
    clear()
