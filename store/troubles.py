"""Says what is wrong with the content of an index, which may come from a failing disk or from anyone.

SQLite finds damaged pages, and values of other types than their columns have. The rest is here: values of the right
types that this store does not write.
"""

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from sqlite_utils import Database

from braidsdk.store.blobs import is_key_record
from braidsdk.store.keys import record_chunk_ids
from braidsdk.store.schema import is_damage

_DIGEST = re.compile(r"[0-9a-f]{32}")


def of_index(db: Database, most: int = 5) -> list[str]:
    """Read the whole index, and say what is wrong, at most so many things. An empty list means that all is well.

    Raises:
        sqlite3.Error: it can't be read.
    """
    found = [str(row[0]) for row in db.execute(f"PRAGMA quick_check({most})") if row[0] != "ok"]
    return found or list(islice(_of_rows(db), most))


def _of_rows(db: Database) -> Iterator[str]:
    for table in _TABLES:
        try:
            for _ in db.execute(f"select * from {table}"):
                pass
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            yield f"{table} has text that is not UTF-8"
            return
    for table, column, is_right in _RULES:
        for number, value in db.execute(f"select rowid, {column} from {table}"):
            if not is_right(value):
                yield f"row {number} of {table} has a {column} that this store does not write"
    columns = "weights, dtype, level, namespace, chunk_id"
    seen = "(select group_concat(chunk_id) from entry_chunks where entry_chunks.digest = entries.digest)"
    for number, text, chunks, *copied in db.execute(f"select rowid, record, {seen}, {columns} from entries"):
        if not _is_record(text):
            continue
        record = json.loads(text)
        own = [record["model"]["weights"], record["model"]["dtype"]]
        own += [record[name] for name in ("level", "namespace", "chunk_id")]
        if own != copied or {*(chunks or "").split(",")} - {""} != {*record_chunk_ids(record)}:
            yield f"row {number} of entries does not agree with its own record"


def _is_digest(value: str) -> bool:
    return bool(_DIGEST.fullmatch(value))


def _is_record(value: str) -> bool:
    found = _parsed(value)
    return is_key_record(found)


def _is_list_of_text(value: str) -> bool:
    found = _parsed(value)
    return isinstance(found, list) and all(isinstance(each, str) for each in found)


def _parsed(value: str) -> object:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


_TABLES = ("chunks", "names", "former_names", "stale", "entries", "entry_chunks", "totals", "damage", "memory")

_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("entries", "digest", _is_digest),
    ("entries", "payload_digest", _is_digest),
    ("entries", "record", _is_record),
    ("entries", "size", lambda value: value > 0),
    ("damage", "chunks", _is_list_of_text),
)
