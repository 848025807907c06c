"""What a store should hold, in plain dicts, and what it does hold; and small entries, each with content of its own."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from conftest import content, make_key
from numpy.random import default_rng

from braidsdk.store import Array, ChunkStore, Entry, EntryKey, Tensors, chunk_id, sha256_of_tokens

SHAPE = (2, 2, 150, 8)  # a little more than a block of 4 KiB


class Known(NamedTuple):
    """An entry: of a text or none, computed after a text or none, and one of several."""

    text: str | None
    after: str | None = None
    number: int = 0


class Model:
    """One namespace of a store, as it should be."""

    def __init__(self, namespace: str = "default") -> None:
        self.namespace = namespace
        self.chunks: dict[str, tuple[set[str], dict[str, Any]]] = {}
        self.entries: set[Known] = set()

    def copy(self) -> "Model":
        return deepcopy(self)

    def add(self, text: str, name: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Register a text, or give it one more name or other metadata. The name is taken from any other text."""
        names, before = self.chunks.get(text, (set(), {}))
        self.chunks[text] = (names, before if metadata is None else dict(metadata))
        if name is not None:
            for others, _ in self.chunks.values():
                others.discard(name)
            names.add(name)

    def delete(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.chunks.pop(text, None)
        self.entries = {each for each in self.entries if each.text not in texts and each.after not in texts}

    def state(self) -> str:
        """All of it as JSON, to compare."""
        return state_of(self.chunks, self.entries)


def from_state(state: str, namespace: str = "default") -> Model:
    model, found = Model(namespace), json.loads(state)
    model.chunks = {text: (set(names), metadata) for text, (names, metadata) in found["chunks"].items()}
    model.entries = {Known(*each) for each in found["entries"]}
    return model


def state_of(chunks: dict[str, tuple[set[str], dict[str, Any]]], entries: Iterable[Known]) -> str:
    listed = {text: [sorted(names), metadata] for text, (names, metadata) in chunks.items()}
    return json.dumps({"chunks": listed, "entries": sorted(entries, key=repr)}, sort_keys=True)


def id_of(text: str, namespace: str = "default") -> str:
    return chunk_id(namespace, 1, text)


def key_of(entry: Known, namespace: str = "default") -> EntryKey:
    after = () if entry.after is None else (id_of(entry.after, namespace),)
    return make_key(
        None if entry.text is None else id_of(entry.text, namespace),
        namespace=namespace,
        tokens=(entry.number, 6, 7),
        after=after,
        after_sha256=sha256_of_tokens((1,) if after else ()),
    )


def tensors_of(entry: Known) -> Tensors:
    """Content that no other entry has."""
    seed = zlib.crc32(hashlib.sha256(repr(entry).encode()).digest())
    data = default_rng(seed).bytes(2 * 2 * 150 * 8)
    return {"layer.000": Array("int8", SHAPE, [memoryview(data)])}


def publish(store: ChunkStore, entries: Sequence[Known], namespace: str = "default") -> None:
    store.publish([(key_of(each, namespace), tensors_of(each), {"of": repr(each)}) for each in entries])


def loaded(store: ChunkStore, entries: Iterable[Known], namespace: str = "default") -> set[Known]:
    """Those of the entries that are there.

    Raises:
        AssertionError: one is not what was written.
    """
    asked = list(entries)
    found = store.load([key_of(each, namespace) for each in asked])
    for each, entry in zip(asked, found, strict=True):
        if isinstance(entry, Entry) and content(entry.tensors) != content(tensors_of(each)):
            raise AssertionError(f"wrong read: {each}")
    return {each for each, entry in zip(asked, found, strict=True) if entry is not None}


def observed(store: ChunkStore, entries: Iterable[Known], namespace: str = "default") -> str:
    """The state of a store; of entries, which of these it has."""
    rows = store.list_chunks(namespace)
    return state_of({row.text: (set(row.names), row.metadata) for row in rows}, loaded(store, entries, namespace))
