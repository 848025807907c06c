"""Rebuilds the index from the entries' files.

It reads only headers and token ids. The tensors are verified when an entry is loaded. A file that is provably not what
its name says is set aside. Names, metadata and chunks without an entry are only in the index, and are lost with it.
"""

import hashlib
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from braidsdk.store import blobs, entries
from braidsdk.store.entries import EntryRow
from braidsdk.store.files import Layout
from braidsdk.store.keys import canonical_json, chunk_id, digest_of, record_chunk_ids


def rebuild(db: Database, layout: Layout) -> None:
    """Fill a new index from the files in their places, inside the caller's transaction."""
    found: list[tuple[str, EntryRow]] = []
    chunks: dict[str, dict[str, Any]] = {}
    for digest in layout.digests():
        path = layout.entry(digest)
        try:
            header = blobs.read_header(path)
            row = _row(path, header)
        except blobs.DamagedFile as error:
            if blobs.is_of_another_format(path):
                continue  # it belongs to another version and stays where it is
            moved = layout.set_aside(digest)
            entries.record_damage(db, digest, namespace="", chunks=[], file=moved, why=str(error))
            continue
        except FileNotFoundError:
            continue
        found.append((header.created, row))
        if header.chunk is not None:
            known = chunks.setdefault(row.chunk_id or "", {**header.chunk, "metadata": "{}", "created": header.created})
            known["created"] = min(known["created"], header.created)
    if chunks:
        db.table("chunks").insert_all(sorted(chunks.values(), key=lambda chunk: (chunk["created"], chunk["id"])))
    if found:
        entries.insert(db, [row for _, row in sorted(found, key=lambda item: item[0])])


def _row(path: Path, header: blobs.Header) -> EntryRow:
    token_bytes = blobs.read_token_bytes(path, header)
    record = canonical_json(header.key)
    if digest_of(record, token_bytes) != path.stem:
        raise blobs.DamagedFile("its name is not the digest of its key")
    own, chunk = header.key["chunk_id"], header.chunk
    if (own is None) != (chunk is None):
        raise blobs.DamagedFile("its chunk is missing")
    if chunk is not None:
        named = chunk_id(chunk["namespace"], chunk["level"], chunk["text"])
        if not own == chunk["id"] == named:
            raise blobs.DamagedFile("its chunk's text is not the one that its key names")
    return EntryRow(
        digest=path.stem,
        chunk_id=own,
        record=record,
        tokens_sha256=hashlib.sha256(token_bytes).hexdigest(),
        tokens=header.tokens,
        bytes=header.nbytes,
        payload_digest=header.digest,
        chunks=record_chunk_ids(header.key),
    )
