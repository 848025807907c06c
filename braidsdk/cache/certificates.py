"""Certificates: what was measured of a model's modes, and its calibration, kept in the store for later calls and
processes.

Knows nothing about texts, and nothing about how fidelity is measured.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from threading import Lock

from braidsdk.compose.modes import parse_mode
from braidsdk.compose.repairs import Guided, parse_repair
from braidsdk.errors import BraidError
from braidsdk.store import ChunkStore, ModelIdentity
from braidsdk.types import Certificate

PREFIX = "certificate:"
"""The keys begin with it under which the store remembers certificates."""

CALIBRATION = "guided:"
"""The keys begin with it under which the store remembers a model's calibration."""


class Certificates:
    """The certificates of one open model and namespace, and how `guided` chooses best in this model.

    Safe to use from several threads. What was read before is used again as long as nobody has written to the store.
    """

    def __init__(self, store: ChunkStore, identity: ModelIdentity, namespace: str) -> None:
        self._store, self._identity, self._namespace = store, identity, namespace
        self._lock = Lock()
        self._version: tuple[int, int] | None = None
        self._known: tuple[Certificate, ...] = ()
        self._calibration: Guided | None = None

    def all(self) -> tuple[Certificate, ...]:
        """Those of all modes; of one mode the newest first."""
        return self._read()[0]

    def calibration(self) -> Guided | None:
        """The rule with the layers and the distance that were found for this model; None if it is not calibrated."""
        return self._read()[1]

    def find(self, mode: str, chunks: int, *, anchor: bool) -> Certificate | None:
        """The newest certificate that fits a mode, a number of context chunks, and a system prompt first or none."""
        return next((each for each in self.all() if each.mode == mode and each.fits(chunks, anchor=anchor)), None)

    def keep(self, certificates: Sequence[Certificate]) -> None:
        """Remember what was measured of this model's modes, in place of what is known for the same number of chunks.

        Raises:
            StoreError: the store can't be written.
        """
        self._store.remember({self._key(each): json.dumps(asdict(each)) for each in certificates})

    def keep_calibration(self, found: Guided) -> None:
        """Remember how `guided` chooses best in this model, in every namespace.

        Raises:
            StoreError: the store can't be written.
        """
        self._store.remember({self._calibration_key: str(found)})

    def _read(self) -> tuple[tuple[Certificate, ...], Guided | None]:
        version = self._store.version()
        with self._lock:
            if version == self._version:
                return self._known, self._calibration
        found = [each for text in self._store.recall_all(PREFIX).values() if (each := parse(text))]
        ours = [each for each in found if self._is_ours(each)]
        known = tuple(sorted(ours, key=lambda each: -each.measured_at))
        kept = parse_repair(self._store.recall([self._calibration_key]).get(self._calibration_key, ""))
        calibration = kept if isinstance(kept, Guided) else None
        with self._lock:
            self._version, self._known, self._calibration = version, known, calibration
        return known, calibration

    def _is_ours(self, certificate: Certificate) -> bool:
        identity = self._identity
        return (certificate.weights, certificate.tokenizer, certificate.dtype, certificate.namespace) == (
            identity.weights,
            identity.tokenizer,
            identity.dtype,
            self._namespace,
        )

    def _key(self, of: Certificate) -> str:
        return PREFIX + self._hashed(self._namespace, of.mode, of.fewest_chunks, of.most_chunks, of.anchor)

    @property
    def _calibration_key(self) -> str:
        return CALIBRATION + self._hashed()

    def _hashed(self, *parts: object) -> str:
        identity = self._identity
        of_model = [identity.weights, identity.tokenizer, identity.dtype]
        return hashlib.sha256(json.dumps([*of_model, *parts]).encode()).hexdigest()


def parse(text: str) -> Certificate | None:
    """A certificate from what the store remembers; None if it is one of another version, which has other figures or
    modes."""
    try:
        found = Certificate(**json.loads(text))
        parse_mode(found.mode)
    except (TypeError, ValueError, BraidError):
        return None
    return found


def stored(store: ChunkStore, namespace: str) -> list[Certificate]:
    """All certificates of a namespace, of every model."""
    found = [each for text in store.recall_all(PREFIX).values() if (each := parse(text))]
    mine = [each for each in found if each.namespace == namespace]
    return sorted(mine, key=lambda each: (each.weights, each.dtype, each.mode, each.fewest_chunks))
