"""How fast one model has been on one device. Rates come from work that was done anyway, and later processes know them.

Knows nothing about texts, modes or files.
"""

import json
from collections import deque
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Literal

Kind = Literal["compute", "load"]
"""What a rate is of: missing entries that are computed and stored, in tokens, or stored entries that are read into the
pool, in bytes."""

KINDS: tuple[Kind, ...] = ("compute", "load")

KEPT = 16
"""A rate is made of this many measurements; older ones are forgotten."""


class Rates:
    """Measured rates of one open Braid. Safe to use from several threads."""

    def __init__(self, prefix: str, remembered: Mapping[str, str]) -> None:
        """Start with the rates of earlier processes.

        Args:
            prefix: names the model and the device.
            remembered: what `changed` of an earlier process returned.
        """
        self._prefix = prefix
        self._lock = Lock()
        self._measured: dict[Kind, deque[tuple[float, float]]] = {kind: deque(maxlen=KEPT) for kind in KINDS}
        self._changed: set[Kind] = set()
        for kind in KINDS:
            if (found := remembered.get(f"{prefix}:{kind}")) is not None:
                amount, seconds = json.loads(found)
                self._measured[kind].append((amount, seconds))

    @staticmethod
    def keys(prefix: str) -> Iterable[str]:
        """The keys to ask a store for before a `Rates` with this prefix is made."""
        return [f"{prefix}:{kind}" for kind in KINDS]

    def add(self, kind: Kind, amount: float, seconds: float) -> None:
        """Take note of tokens or bytes, and how long they took."""
        if amount > 0 and seconds > 0:
            with self._lock:
                self._measured[kind].append((amount, seconds))
                self._changed.add(kind)

    def amount(self, kind: Kind) -> float:
        """How many tokens or bytes the rate was measured on. A rate from few is not reliable."""
        with self._lock:
            return sum(amount for amount, _ in self._measured[kind])

    def per_s(self, kind: Kind) -> float | None:
        """Tokens or bytes per second; None before any was measured."""
        with self._lock:
            measured = self._measured[kind]
            return sum(amount for amount, _ in measured) / sum(time for _, time in measured) if measured else None

    def seconds_for(self, kind: Kind, amount: float) -> float | None:
        """The expected time for this many tokens or bytes; None before any was measured."""
        rate = self.per_s(kind)
        return None if rate is None else amount / rate

    def changed(self) -> dict[str, str]:
        """What to remember for later processes."""
        with self._lock:
            return {
                f"{self._prefix}:{kind}": json.dumps(_total(self._measured[kind])) for kind in sorted(self._changed)
            }


def _total(measured: Iterable[tuple[float, float]]) -> tuple[float, float]:
    amounts, times = zip(*measured, strict=True)
    return sum(amounts), sum(times)
