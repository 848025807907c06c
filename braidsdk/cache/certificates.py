"""Certificates: what was measured of a model's modes, and its calibration, kept in the store for later calls and
processes.

Knows nothing about texts, and nothing about how fidelity is measured.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from threading import Lock

from braidsdk.store import ChunkStore, ModelIdentity
from braidsdk.types import Certificate

PREFIX = "certificate:"
"""The keys begin with it under which the store remembers certificates."""

LAYERS = "guided layers:"
"""The keys begin with it under which the store remembers a model's layers."""

KEPT = 8
"""Of one mode, certificates of so many ranges of chunks are kept. The oldest one is forgotten first."""


class Certificates:
    """The certificates of one open model and namespace, and the layers that `guided` looks at in this model.

    Safe to use from several threads. What was read before is used again as long as nobody has written to the store.
    """

    def __init__(self, store: ChunkStore, identity: ModelIdentity, namespace: str) -> None:
        self._store, self._identity, self._namespace = store, identity, namespace
        self._lock = Lock()
        self._version: tuple[int, int] | None = None
        self._known: tuple[Certificate, ...] = ()
        self._layers: tuple[int, ...] = ()

    def all(self) -> tuple[Certificate, ...]:
        """Those of all modes; of one mode the newest first."""
        return self._read()[0]

    def layers(self) -> tuple[int, ...]:
        """The layers that were found for this model, ascending; empty if it is not calibrated."""
        return self._read()[1]

    def find(self, mode: str, chunks: int) -> Certificate | None:
        """The newest certificate that fits a mode and a number of context chunks."""
        return next((each for each in self.all() if each.mode == mode and each.fits(chunks)), None)

    def keep(self, certificates: Sequence[Certificate]) -> None:
        """Remember what was measured of this model's modes, in place of what is known for the same number of chunks.

        Raises:
            StoreError: the store can't be written.
        """
        values, known = {}, self.all()
        for new in certificates:
            span = (new.fewest_chunks, new.most_chunks)
            old = [each for each in known if each.mode == new.mode and (each.fewest_chunks, each.most_chunks) != span]
            values[self._key(new.mode)] = json.dumps([asdict(each) for each in (new, *old)[:KEPT]])
        self._store.remember(values)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Remember the layers that `guided` looks at in this model, in every namespace.

        Raises:
            StoreError: the store can't be written.
        """
        self._store.remember({self._layers_key: json.dumps(sorted(layers))})

    def _read(self) -> tuple[tuple[Certificate, ...], tuple[int, ...]]:
        version = self._store.version()
        with self._lock:
            if version == self._version:
                return self._known, self._layers
        found = chain.from_iterable(map(parse, self._store.recall_all(PREFIX).values()))
        known = tuple(each for each in found if self._is_ours(each))
        layers = tuple(json.loads(self._store.recall([self._layers_key]).get(self._layers_key, "[]")))
        with self._lock:
            self._version, self._known, self._layers = version, known, layers
        return known, layers

    def _is_ours(self, certificate: Certificate) -> bool:
        identity = self._identity
        return (certificate.weights, certificate.tokenizer, certificate.dtype, certificate.namespace) == (
            identity.weights,
            identity.tokenizer,
            identity.dtype,
            self._namespace,
        )

    def _key(self, mode: str) -> str:
        return PREFIX + self._hashed(self._namespace, mode)

    @property
    def _layers_key(self) -> str:
        return LAYERS + self._hashed()

    def _hashed(self, *parts: str) -> str:
        identity = self._identity
        of_model = [identity.weights, identity.tokenizer, identity.dtype]
        return hashlib.sha256(json.dumps([*of_model, *parts]).encode()).hexdigest()


def parse(text: str) -> list[Certificate]:
    """Certificates from what the store remembers. Those of another version that has other figures are left out."""
    try:
        return [Certificate(**each) for each in json.loads(text)]
    except (TypeError, ValueError):
        return []


def stored(store: ChunkStore, namespace: str) -> list[Certificate]:
    """All certificates of a namespace, of every model."""
    found = [each for text in store.recall_all(PREFIX).values() for each in parse(text)]
    mine = [each for each in found if each.namespace == namespace]
    return sorted(mine, key=lambda each: (each.weights, each.dtype, each.mode, each.fewest_chunks))
