"""The kernels that a Braid's model runs on, and how they do here."""

from collections.abc import Callable
from dataclasses import asdict

from braidsdk.engine.engine import Engine
from braidsdk.engine.self_test import self_test
from braidsdk.errors import InputError, shown
from braidsdk.kernels.backends import OBSTACLES, Geometry, obstacle
from braidsdk.kernels.selftest import Result


class Kernels:
    """`Braid.kernels`: the kernels that its model runs on. `str()` of it is for people, as in "triton" or "triton for
    norm_qkv and swiglu, torch for attention"."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def backends(self) -> dict[str, str]:
        """The backend of each operation: "triton", "native" or "torch", by the operation's name, as
        `Braid(kernels=...)` takes it."""
        self._engine.check_open()
        return asdict(self._engine.backends)

    def obstacle(self, backend: str) -> str | None:
        """Why a backend can't run this model here; None if it can.

        Args:
            backend: "triton", "native" or "torch". The first time "native" compiles its kernels.

        Raises:
            InputError: no such backend.
        """
        for known in OBSTACLES:
            if backend == known:
                return obstacle(known, self._geometry(), self._engine.device)
        raise InputError(f"backend must be {' or '.join(map(repr, OBSTACLES))}; got {shown(backend)}.")

    def _geometry(self) -> Geometry:
        self._engine.check_open()
        return self._engine.geometry

    def self_test(self, *, timed: bool = False, on_progress: Callable[[int, int], None] | None = None) -> list[Result]:
        """Compute each Triton kernel at the model's own shapes, in up to eight processes, and compare it with float64.
        Takes up to a minute, and memory of the device beside the model's.

        Args:
            timed: whether to time them too.
            on_progress: called with the cases done and those to be done. What it raises ends it.

        Returns:
            A result for each operation and shape: `op`, `case`, `error` (relative, against float64), the `limit` that
            rounding alone stays below, `us` and `bandwidth` if it was timed, and `trouble` in words. `ok` says whether
            it is right; a kernel that ends its process is not.

        Raises:
            InputError: Triton's kernels can't run this model here.
        """
        if reason := self.obstacle("triton"):
            raise InputError(
                f"kernels that are tested must be able to run this model; {reason}. Ask obstacle('triton') first."
            )
        return self_test(self._geometry(), self._engine.device, timed=timed, report=on_progress)

    def launches(self) -> dict[str, int]:
        """How many kernels each pass launches that was captured as a CUDA graph so far, by the pass's name. Empty where
        the model does not run on graphs. `Braid.warm_up` captures the passes beforehand."""
        return self._engine.launches()

    def __str__(self) -> str:
        return str(self._engine.backends)
