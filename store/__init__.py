"""Chunks and their computed KV entries on disk.

    keys.py     the data that names a chunk and an entry
    blobs.py    reads and writes one entry as one verified safetensors file
    files.py    knows where files lie, and moves them durably
    schema.py   the index's tables, with append-only migrations
    index.py    the open index, with its lock and transactions
    chunks.py   registered chunks and names, as rows
    entries.py  KV entries, as rows
    memory.py   what processes remember for later ones
    claims.py   which entries a process computes
    reasons.py  says why a look-up missed
    troubles.py says what is wrong with the content of an index
    check.py    looks at everything, and says what is wrong
    rebuild.py  rebuilds the index from the files
    store.py    ChunkStore, which puts these together

The store keeps named tensors as bytes with a dtype and a shape. It knows no torch, no model, no codec and no mode.
"""

from braidsdk.store.blobs import Array, Tensors
from braidsdk.store.check import Checked
from braidsdk.store.chunks import ChunkRow, NewChunk
from braidsdk.store.entries import Entry, EntryGroup, Hit
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
from braidsdk.store.memory import counters
from braidsdk.store.reasons import Miss
from braidsdk.store.store import ChunkStore, Deleted, Publication, StoreStats

__all__ = [
    "ALGORITHM_VERSION",
    "FORMAT_VERSION",
    "Array",
    "Checked",
    "ChunkRow",
    "ChunkStore",
    "Deleted",
    "Difference",
    "Entry",
    "EntryGroup",
    "EntryKey",
    "Hit",
    "Miss",
    "ModelIdentity",
    "NewChunk",
    "Publication",
    "StoreStats",
    "Tensors",
    "chunk_id",
    "counters",
    "differences",
    "sha256_of_tokens",
]
