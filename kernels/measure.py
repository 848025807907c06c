"""Calls, times and bytes of the model's operations, from `start` on. Off by default, which costs one `if` a call.

On a GPU, CUDA events around each call measure it by itself, its weights and memory not in the L2 cache: before the
first event, memory larger than that is read, for long enough that all of the call is launched meanwhile. So calls must
not be captured in a CUDA graph while this is on.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_READ_BYTES = 256 * 2**20
_READ_TIMES = 4
"""Some 0.3 ms on an H200: longer than the host takes to launch one operation. Reading leaves nothing that the call must
first write back."""

_PENDING = 1024
"""Calls whose events are read together."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Total:
    """Calls of one operation by one backend.

    Attributes:
        calls: how many there were.
        timed: how many of them were timed; on a GPU, not those of Triton's kernels that the host launched too slowly,
            as when it compiles. What torch takes there includes its waits for the host.
        seconds: of the timed ones.
        bytes: what all calls read and wrote: weights, activations and results once a call, and what the operation
            says of paged memory.
    """

    calls: int = 0
    timed: int = 0
    seconds: float = 0.0
    bytes: int = 0


class _Meter:
    """Counts and times."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, str], Total] = {}
        self._pending: list[tuple[Total, torch.cuda.Event, torch.cuda.Event]] = []
        self._scratch: dict[torch.device, Tensor] = {}

    def run(self, key: tuple[str, str], device: torch.device, work: Callable[[], R]) -> R:
        """Do the work, count it and take its time."""
        total = self.totals.setdefault(key, Total())
        total.calls += 1
        if device.type != "cuda":
            started = perf_counter()
            result = work()
            total.seconds += perf_counter() - started
            total.timed += 1
            return result
        if device not in self._scratch:
            self._scratch[device] = torch.zeros(_READ_BYTES // 4, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_READ_TIMES):
            self._scratch[device].sum()
        begin.record()
        result = work()
        end.record()
        if key[1] == "torch" or not begin.query():  # the GPU was still busy when all was launched
            self._pending.append((total, begin, end))
        if len(self._pending) >= _PENDING:
            self.settle()
        return result

    def settle(self) -> None:
        """Read the events."""
        for total, begin, end in self._pending:
            end.synchronize()
            total.seconds += begin.elapsed_time(end) / 1e3
            total.timed += 1
        self._pending.clear()


_meter: _Meter | None = None


def start() -> None:
    """Measure every call from now on; what was counted before is forgotten."""
    global _meter
    _meter = _Meter()


def stop() -> None:
    """Measure no more."""
    global _meter
    _meter = None


def measuring() -> bool:
    """Whether calls are measured."""
    return _meter is not None


def totals() -> dict[tuple[str, str], Total]:
    """By operation and backend, in the order of their first calls; waits for the GPU."""
    if _meter is None:
        return {}
    _meter.settle()
    return _meter.totals


def _no_bytes(**_: object) -> int:
    return 0


def _asked(backend: str = "torch", **_: object) -> str:
    return backend


def measured(
    op: str, *, kv_bytes: Callable[..., int] = _no_bytes, backend: Callable[..., str] = _asked
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have an operation's calls measured while `measuring`.

    Args:
        op: the operation, by its name in `kernels.backends.Backends`.
        kv_bytes: bytes of its argument `kv` that a call reads and writes; takes the arguments of the operation by name.
        backend: what computes a call; likewise.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if _meter is None:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            key = op, backend(**given)
            first = next(value for value in given.values() if isinstance(value, Tensor))
            result = _meter.run(key, first.device, lambda: function(*args, **kwargs))
            _meter.totals[key].bytes += kv_bytes(**given) + sum(
                _nbytes(value) for name, value in (*given.items(), ("", result)) if name not in ("kv", "plan")
            )
            return result

        return run

    return decorate


def _nbytes(value: Any) -> int:
    """Bytes of a tensor, or of the tensors of a dataclass."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple):
        return sum(map(_nbytes, value))
    if is_dataclass(value):
        return sum(_nbytes(getattr(value, each.name)) for each in fields(value))
    return 0
