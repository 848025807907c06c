"""Chunks and their computed KV entries on disk.

    keys.py      the data that names a chunk and an entry
    blobs.py     reads and writes one entry as one verified safetensors file
    files.py     knows where files lie, and moves them durably
    schema.py    the index's tables, with append-only migrations
    index.py     the open index, with its lock and transactions
    chunks.py    registered chunks and names, as rows
    entries.py   KV entries, as rows
    memory.py    what processes remember for later ones
    claims.py    which entries a process computes, and which it reads
    limits.py    how large a store may become
    collect.py   evicts and sweeps
    reasons.py   says why a look-up missed
    troubles.py  says what is wrong with the content of an index
    check.py     looks at everything, and says what is wrong
    catalogue.py keeps each chunk in a file of its own too
    rebuild.py   rebuilds the index from the files
    repair.py    makes the index and the files agree
    archive.py   exports a corpus, and imports it
    store.py     ChunkStore, which puts these together

The store keeps named tensors as bytes with a dtype and a shape. It knows no torch, no model, no codec and no mode.
"""

from braidsdk.store.blobs import Array, Tensors
from braidsdk.store.check import Checked
from braidsdk.store.chunks import ChunkRow, NameVersion, NewChunk
from braidsdk.store.collect import DAMAGED_S, Collected
from braidsdk.store.entries import Entry, EntryGroup, Hit
from braidsdk.store.files import REPAIR
from braidsdk.store.keys import (
    ALGORITHM_VERSION,
    FORMAT_VERSION,
    Difference,
    EntryKey,
    ModelIdentity,
    chunk_id,
    differences,
    sha256_of_tokens,
)
from braidsdk.store.limits import WHOLE, Limit
from braidsdk.store.memory import counters
from braidsdk.store.reasons import Miss
from braidsdk.store.rebuild import Rebuilt
from braidsdk.store.repair import Repaired, repair
from braidsdk.store.store import ChunkStore, Deleted, Publication, StoreStats

__all__ = [
    "ALGORITHM_VERSION",
    "DAMAGED_S",
    "FORMAT_VERSION",
    "REPAIR",
    "WHOLE",
    "Array",
    "Checked",
    "ChunkRow",
    "ChunkStore",
    "Collected",
    "Deleted",
    "Difference",
    "Entry",
    "EntryGroup",
    "EntryKey",
    "Hit",
    "Limit",
    "Miss",
    "ModelIdentity",
    "NameVersion",
    "NewChunk",
    "Publication",
    "Rebuilt",
    "Repaired",
    "StoreStats",
    "Tensors",
    "chunk_id",
    "counters",
    "differences",
    "repair",
    "sha256_of_tokens",
]
