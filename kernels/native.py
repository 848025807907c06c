"""Kernels in C for x86-64 CPUs: compiled on first use with the user's C compiler, loaded through ctypes.

What was compiled is kept in `$XDG_CACHE_HOME/braidsdk/native`, or `~/.cache/braidsdk/native`, by the hash of all that
it was made of. `code_cache.py` sees to it that nobody else can put code there.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from braidsdk.kernels import code_cache


@dataclass(frozen=True)
class Level:
    """What the kernels use of a CPU.

    Attributes:
        name: as users read it.
        features: that it needs, as /proc/cpuinfo names them.
    """

    name: str
    features: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """For the compiler, all spelled out: what is kept runs on every machine with these features."""
        return (*FLAGS, *(f"-m{each.replace('avx512_', 'avx512').replace('_', '-')}" for each in self.features))


_AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16", "avx512_vnni")

LEVELS = (
    Level("amx", (*_AVX512_BF16, "amx_tile", "amx_bf16")),
    Level("avx512_bf16", _AVX512_BF16),
    Level("avx512", _AVX512),
    Level("avx2", ("avx2", "fma")),
)
"""Best first. The C files choose among their loops by the macros that these flags define."""

_TILE_HEAD_DIMS = (32, 64, 96, 128)
"""What attention by tiles of AMX takes."""

FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off")
"""For the compiler, on every level."""

_FOLDER = Path(__file__).resolve().parent
_OPENMP = ("libgomp", "libiomp5", "libomp")


class _Runtime(ctypes.Structure):
    """`Runtime` of native.c: functions of the OpenMP library that torch has loaded."""

    _fields_ = (("parallel", ctypes.c_void_p), ("thread", ctypes.c_void_p), ("threads", ctypes.c_void_p))


@cache
def levels() -> tuple[Level, ...]:
    """The levels that this machine's CPU has, best first."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return tuple(
        level
        for level in LEVELS
        if set(level.features) <= set(flags) and ("amx_tile" not in level.features or _tiles_granted())
    )


def level() -> Level:
    """What the C kernels are compiled for: the best that the CPU has. Tests put another in its place."""
    return levels()[0]


def head_dim_obstacle(head_dim: int) -> str | None:
    """What a head_dim must be on this CPU, in words; None if the attention takes this one."""
    if level().name == "amx":
        return None if head_dim in _TILE_HEAD_DIMS else f"a head_dim of {', '.join(map(str, _TILE_HEAD_DIMS))}"
    return None if head_dim in range(16, 129, 16) else "a head_dim that is a multiple of 16, up to 128"


def _tiles_granted() -> bool:
    """Ask Linux for AMX's tiles, for this process: it grants them from 5.16 on, unless a sandbox is in the way."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


@cache
def cpu_obstacle() -> str | None:
    """Why this machine's CPU can't run the kernels, whatever is installed; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"they are for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    try:
        has_one = bool(levels())
    except OSError as error:
        return f"/proc/cpuinfo can't be read ({error.strerror})"
    return None if has_one else f"this CPU lacks {' or '.join(LEVELS[-1].features)}"


@cache
def obstacle() -> str | None:
    """Why C kernels can't run here; None if they can. The first call on a machine compiles all of them."""
    if reason := cpu_obstacle():
        return reason
    try:
        for source in sorted(_FOLDER.rglob("*.c")):
            library(source)  # now, where a fault leaves time for another path
        _runtime()
    except (RuntimeError, OSError, ValueError) as error:
        return str(error)
    return None


@cache
def library(source: Path) -> ctypes.CDLL:
    """A C file's functions, compiled for this CPU unless it was before. It may include our headers and those beside it.

    Raises:
        RuntimeError: there is no C compiler, it does not compile, or what it makes can't be kept.
    """
    compiler = _compiler()
    made_of = hashlib.sha256("\0".join((*compiler, _version(compiler), *level().flags)).encode())
    for file in (source, *sorted({*_FOLDER.glob("*.h"), *source.parent.glob("*.h")})):
        made_of.update(file.read_bytes())
    name = source.stem if source.parent == _FOLDER else f"{source.parent.name}-{source.stem}"
    built = f"{name}-{made_of.hexdigest()[:24]}.so"
    try:
        with code_cache.opened(_cache_folder()) as folder:
            code = code_cache.read(folder, built)
            if code is None:
                code = _compiled(compiler, source, folder.path)
                code_cache.write(folder, built, code)
    except OSError as error:
        raise RuntimeError(
            f"compiled C kernels can't be kept in {_cache_folder()} ({error}); set XDG_CACHE_HOME to another folder"
        ) from error
    return code_cache.load(built, code)


def parallel(function: "ctypes._NamedFuncPointer", arguments: ctypes.Structure, threads: int | None = None) -> None:
    """Run `void function(void *arguments, int thread, int threads)` on torch's own threads, once on each.

    Args:
        function: of a `library`. It must give the same for every number of threads: there may be fewer than asked for.
        arguments: what it takes. The memory under its pointers must stay until this returns.
        threads: how many; None for `torch.get_num_threads()`.
    """
    address = ctypes.cast(function, ctypes.c_void_p)
    _starter()(_runtime(), address, ctypes.byref(arguments), threads or torch.get_num_threads())


@cache
def _starter() -> "ctypes._NamedFuncPointer":
    start = library(_FOLDER / "native.c").braid_parallel
    start.argtypes = [ctypes.POINTER(_Runtime), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    start.restype = None
    return start


@cache
def _runtime() -> _Runtime:
    """The OpenMP library of torch: a second one would have threads of its own, and the two would wait on each other.

    Raises:
        RuntimeError: torch has none.
    """
    loaded = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    mine = sorted(path for path in loaded if Path(path).name.startswith(_OPENMP))
    beside_torch = [path for path in mine if Path(path).is_relative_to(Path(torch.__file__).resolve().parent)]
    for path in (*beside_torch, *mine):
        openmp = ctypes.CDLL(path)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        if all(hasattr(openmp, name) for name in names):
            return _Runtime(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in names))
    raise RuntimeError("torch runs without an OpenMP library here; install torch's own wheel")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braidsdk" / "native"


def _compiler() -> list[str]:
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise RuntimeError(f"$CC must be a command with its arguments; got {os.environ['CC']!r} ({error})") from error
    for command in (given,) if given else (["cc"], ["gcc"], ["clang"]):
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise RuntimeError(
        f"the C compiler {given[0]!r} of $CC was not found" if given else "there is no C compiler; install gcc or clang"
    )


@cache
def _version_of(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return done.stdout.partition("\n")[0]


def _version(compiler: list[str]) -> str:
    return _version_of(tuple(compiler))


def _compiled(compiler: list[str], source: Path, folder: Path) -> bytes:
    """A shared library. Nothing of it is written outside the folder."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch) / "compiled.so"
        command = [*compiler, *level().flags, f"-I{_FOLDER}", "-o", str(target), str(source), "-lm"]
        environment = {**os.environ, "TMPDIR": scratch}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[:6])
            raise RuntimeError(f"{compiler[0]} can't compile {source.name} (gcc 11 or clang 12 can):\n{said}")
        return target.read_bytes()
