"""Chunks and their computed KV entries on disk.

    keys.py     what names a chunk and an entry: pure data
    blobs.py    one entry as one verified safetensors file
    files.py    where files lie, and moving them durably
    schema.py   the index's tables, append-only migrations
    index.py    the open index: lock and transactions
    chunks.py   registered chunks and names, as rows
    entries.py  KV entries, as rows
    memory.py   what processes leave for later ones to know
    reasons.py  why a look-up missed
    rebuild.py  the index from the files
    store.py    ChunkStore, which puts these together

It keeps bytes with a dtype and a shape: no torch, no model, no mode is known here.
"""

from braidsdk.store.blobs import Place, Slab
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
from braidsdk.store.reasons import Miss
from braidsdk.store.store import ChunkStore, Deleted, Publication, StoreStats

__all__ = [
    "ALGORITHM_VERSION",
    "FORMAT_VERSION",
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
    "Place",
    "Publication",
    "Slab",
    "StoreStats",
    "chunk_id",
    "differences",
    "sha256_of_tokens",
]
