"""Values of recent keys, bounded by their bytes. Knows nothing about what the values are."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from sys import getsizeof
from threading import Lock
from typing import Generic, TypeVar

BOUND_BYTES = 32 * 2**20
"""Bytes that one `LRU` of texts or token ids may hold: about 700,000 token ids."""

ID_BYTES = 40
"""What one token id takes: an int, and its place in a tuple."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRU(Generic[K, V]):
    """Keeps the most recently used values, as many as fit in its bound. Safe to use from several threads."""

    def __init__(self, bound_bytes: int = BOUND_BYTES) -> None:
        self._bound_bytes = bound_bytes
        self._bytes = 0
        self._known: OrderedDict[K, tuple[V, int]] = OrderedDict()  # the least recently used first
        self._lock = Lock()

    def get(self, key: K) -> V | None:
        """The value of a key. None if it is not kept, or not any more."""
        with self._lock:
            found = self._known.get(key)
            if found is None:
                return None
            self._known.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Keep a value, in place of what the key had. A value larger than the bound is not kept.

        Args:
            key: its key.
            value: the value.
            nbytes: bytes that key and value take.
        """
        with self._lock:
            _, freed = self._known.pop(key, (None, 0))
            self._bytes -= freed
            if nbytes > self._bound_bytes:
                return
            self._known[key] = value, nbytes
            self._bytes += nbytes
            while self._bytes > self._bound_bytes:
                _, (_, freed) = self._known.popitem(last=False)
                self._bytes -= freed

    def forget(self, key: K) -> None:
        """Keep nothing under this key."""
        with self._lock:
            _, freed = self._known.pop(key, (None, 0))
            self._bytes -= freed


def nbytes_of(text: str, *token_ids: Sequence[int]) -> int:
    """Bytes that a text and tuples of token ids take."""
    return getsizeof(text) + ID_BYTES * sum(map(len, token_ids))


class Remembering:
    """Encodes texts, and no recent text again."""

    def __init__(self, encode: Callable[[str], tuple[int, ...]]) -> None:
        self._encode = encode
        self._known: LRU[str, tuple[int, ...]] = LRU()

    def __call__(self, text: str) -> tuple[int, ...]:
        """The text's token ids."""
        token_ids = self._known.get(text)
        if token_ids is None:
            token_ids = self._encode(text)
            self._known.put(text, token_ids, nbytes_of(text, token_ids))
        return token_ids

    def apart(self) -> "Remembering":
        """One that encodes alike and remembers by itself."""
        return Remembering(self._encode)

    def forget(self, text: str) -> None:
        """Remember nothing of a text."""
        self._known.forget(text)
