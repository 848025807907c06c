"""The Braid of each namespace, over one engine."""

from collections import OrderedDict
from threading import Lock

from braidsdk import Braid

SALTED = "\x1f"
"""Stands between a namespace and the salt of a request. No namespace of a key has it, so that no salt leads to another
key's chunks."""

MOST = 256
"""Namespaces that are remembered. One that was forgotten only tokenizes its texts again."""


class Tenants:
    """Gives each caller the Braid of their namespace."""

    def __init__(self, braid: Braid) -> None:
        self.first = braid
        self._known: OrderedDict[str, Braid] = OrderedDict()
        self._lock = Lock()

    def salted(self, namespace: str, salt: str) -> Braid:
        """A Braid for one request, of which nothing is remembered but entries in memory: there may be any number."""
        return self.first.in_namespace(f"{namespace}{SALTED}{salt}", counted=False)

    def __getitem__(self, namespace: str) -> Braid:
        with self._lock:
            found = self._known.get(namespace)
            if found is None:
                found = self._known[namespace] = self.first.in_namespace(namespace)
                if len(self._known) > MOST:
                    self._known.popitem(last=False)
            self._known.move_to_end(namespace)
            return found
