"""Certificates: what was measured of a model's modes, kept in the store for later calls and processes.

Knows nothing about texts, and nothing about how fidelity is measured.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from threading import Lock

from braidsdk.store import ChunkStore, ModelIdentity
from braidsdk.types import Certificate

PREFIX = "certificate:"
"""The keys begin with it under which the store remembers certificates."""

KEPT = 8
"""Of one mode, certificates of so many ranges of chunks are kept. The oldest one is forgotten first."""


class Certificates:
    """The certificates of one open model and namespace. Safe to use from several threads."""

    def __init__(self, store: ChunkStore, identity: ModelIdentity, namespace: str) -> None:
        self._store, self._identity, self._namespace = store, identity, namespace
        self._lock = Lock()
        self._version: tuple[int, int] | None = None
        self._known: dict[str, tuple[Certificate, ...]] = {}

    def find(self, mode: str, chunks: int) -> Certificate | None:
        """The newest certificate that fits a mode and a number of context chunks. What was read before is used again as
        long as nobody has written to the store."""
        version = self._store.version()
        with self._lock:
            if version != self._version:
                self._version, self._known = version, {}
            found = self._known.get(mode)
        if found is None:
            found = self._read(mode)
            with self._lock:
                if version == self._version:
                    self._known[mode] = found
        return next((each for each in found if each.fits(chunks)), None)

    def keep(self, certificates: Sequence[Certificate]) -> None:
        """Remember what was measured of this model's modes, in place of what is known for the same number of chunks.

        Raises:
            StoreError: the store can't be written.
        """
        values = {}
        for new in certificates:
            span = (new.fewest_chunks, new.most_chunks)
            old = [each for each in self._read(new.mode) if (each.fewest_chunks, each.most_chunks) != span]
            values[self._key(new.mode)] = json.dumps([asdict(each) for each in (new, *old)[:KEPT]])
        self._store.remember(values)

    def _read(self, mode: str) -> tuple[Certificate, ...]:
        key = self._key(mode)
        found = parse(self._store.recall([key]).get(key, "[]"))
        return tuple(each for each in found if self._is_ours(each) and each.mode == mode)

    def _is_ours(self, certificate: Certificate) -> bool:
        identity = self._identity
        return (certificate.weights, certificate.tokenizer, certificate.dtype, certificate.namespace) == (
            identity.weights,
            identity.tokenizer,
            identity.dtype,
            self._namespace,
        )

    def _key(self, mode: str) -> str:
        identity = self._identity
        parts = [identity.weights, identity.tokenizer, identity.dtype, self._namespace, mode]
        return PREFIX + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
