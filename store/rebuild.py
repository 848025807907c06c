"""Rebuilds the index from the files of chunks and entries.

Of an entry it reads only the header and the token ids: the tensors are verified when it is loaded. A file that is
provably not what its name says is set aside. The text of a chunk whose file is damaged comes from an entry of it; its
names and metadata are lost. A chunk without a file was deleted, and what is left of its entries stays out.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from braidsdk.store import blobs, catalogue, chunks, entries
from braidsdk.store.blobs import DamagedFile
from braidsdk.store.catalogue import Record
from braidsdk.store.entries import EntryRow
from braidsdk.store.files import Layout
from braidsdk.store.keys import canonical_json, chunk_id, digest_of, record_chunk_ids


@dataclass(frozen=True)
class Rebuilt:
    """What an index was rebuilt from.

    Attributes:
        chunks: chunks that it has now.
        entries: entries that it has now.
        damaged: the path of each damaged file, with the reason. They are moved to damaged/ after the commit, because
            the index has nothing of them until then.
        aside: the names that they get there.
        without_names: ids of chunks whose names and metadata are lost. Their text comes from an entry.
    """

    chunks: int
    entries: int
    damaged: tuple[tuple[Path, str], ...]
    aside: tuple[str, ...]
    without_names: tuple[str, ...]


def rebuild(db: Database, layout: Layout) -> Rebuilt:
    """Fill a new index from the files in their places, inside the caller's transaction."""
    any_file = layout.chunks.is_dir()  # if not, the texts of all entries are taken
    found = dict(catalogue.read_all(layout))
    records = {each: record for each, record in found.items() if isinstance(record, Record)}
    damaged = {layout.chunk(each): error for each, error in found.items() if isinstance(error, DamagedFile)}
    headers: dict[str, tuple[blobs.Header, EntryRow]] = {}
    for digest in layout.digests():
        path = layout.entry(digest)
        try:
            header = blobs.read_header(path)
            headers[digest] = header, row_of(path, header, digest)
        except DamagedFile as error:
            if not blobs.is_of_another_format(path):  # else it belongs to another version and stays where it is
                damaged[path] = error
        except FileNotFoundError:
            continue
    recovered = _recovered(headers, {each for each in found if each not in records} if any_file else None)
    changed = _add_chunks(db, {**records, **recovered})
    chunks.touch(db, {*changed, *recovered})
    kept = [
        (header.created, row)
        for header, row in headers.values()
        if not any_file or all(each in records or each in recovered for each in row.chunks)
    ]
    if kept:
        entries.insert(db, [row for _, row in sorted(kept, key=lambda item: item[0])])
    aside = tuple(map(layout.aside_name, damaged))
    for (path, why), name in zip(damaged.items(), aside, strict=True):
        about = [path.stem] if path.suffix == ".json" else []
        entries.record_damage(db, path.stem, namespace="", chunks=about, file=name, why=str(why))
    return Rebuilt(
        chunks=len(records) + len(recovered),
        entries=len(kept),
        damaged=tuple((path, str(why)) for path, why in damaged.items()),
        aside=aside,
        without_names=tuple(recovered),
    )


def _recovered(headers: Mapping[str, tuple[blobs.Header, EntryRow]], wanted: set[str] | None) -> dict[str, Record]:
    """The chunks that entries are of, as far as their text says; None wants all of them."""
    found: dict[str, Record] = {}
    for header, _ in sorted(headers.values(), key=lambda item: item[0].created):
        chunk = header.chunk
        if chunk is not None and (wanted is None or chunk["id"] in wanted):
            more = {"metadata": "{}", "created": header.created, "number": 0, "pinned": False}
            found.setdefault(chunk["id"], Record({**chunk, **more}))
    return found


def _add_chunks(db: Database, records: Mapping[str, Record]) -> set[str]:
    """Insert chunks with their names now and before. Returns the ids of those whose files are not right."""
    changed = set()

    def numbered(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows in the order of their numbers; those without one come last."""
        last = 0
        for row in sorted(rows, key=lambda row: (row["number"] <= 0, row["number"])):
            last = max(last + 1, row["number"])
            if row["number"] != last:
                changed.add(row.get("chunk_id") or row["id"])
            yield {**row, "number": last}

    def of_all(which: str) -> list[dict[str, Any]]:
        return [
            {**row, "namespace": record.chunk["namespace"], "chunk_id": each}
            for each, record in records.items()
            for row in getattr(record, which)
        ]

    current: dict[tuple[str, str], dict[str, Any]] = {}
    former = of_all("former")
    for row in numbered(of_all("names")):
        if before := current.get((row["namespace"], row["name"])):
            # A process that moved the name was killed before it moved both files to their places.
            former.append({**before, "number": 0, "until": row["since"]})
            changed.add(before["chunk_id"])
        current[row["namespace"], row["name"]] = row
    db.table("chunks").insert_all(numbered([record.chunk for record in records.values()]))
    db.table("names").insert_all(current.values())
    db.table("former_names").insert_all(numbered(former))
    return changed


def row_of(path: Path, header: blobs.Header, digest: str) -> EntryRow:
    """What the index keeps of the entry in a file that must have this digest.

    Raises:
        DamagedFile: it has another, or not the chunk that its key names.
    """
    token_bytes = blobs.read_token_bytes(path, header)
    record = canonical_json(header.key)
    if digest_of(record, token_bytes) != digest:
        raise DamagedFile("its name is not the digest of its key")
    own, chunk = header.key["chunk_id"], header.chunk
    if (own is None) != (chunk is None):
        raise DamagedFile("its chunk is missing")
    if chunk is not None:
        named = chunk_id(chunk["namespace"], chunk["level"], chunk["text"])
        agrees = all(header.key[name] == chunk[name] for name in ("namespace", "level"))
        if not own == chunk["id"] == named or not agrees:
            raise DamagedFile("its chunk's text is not the one that its key names")
    return EntryRow(
        digest=digest,
        chunk_id=own,
        record=record,
        tokens_sha256=hashlib.sha256(token_bytes).hexdigest(),
        tokens=header.tokens,
        bytes=header.nbytes,
        size=header.end,
        payload_digest=header.digest,
        chunks=record_chunk_ids(header.key),
    )
