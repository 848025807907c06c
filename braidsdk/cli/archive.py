"""`braid store export` and `braid store import` move a corpus to another store. They load no model."""

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from braidsdk.cli.exits import NotFoundError
from braidsdk.cli.opening import open_store
from braidsdk.cli.options import NamespaceOption, StoreOption
from braidsdk.cli.output import Output, counted
from braidsdk.cli.select import StoredChunks, select
from braidsdk.progress import steps_bar
from braidsdk.settings import index_folder, store_folder
from braidsdk.store import ChunkStore
from braidsdk.store.archive import Moved, export_chunks, import_chunks
from braidsdk.types import size

KEY = "BRAID_ARCHIVE_KEY"
"""The environment variable that signs and verifies archives."""


def export(
    out: Output,
    file: Annotated[Path, typer.Argument(help="The archive to write. It must not be there yet.")],
    names: Annotated[list[str] | None, typer.Argument(help="Names, ids or globs. Without one: all chunks.")] = None,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
) -> None:
    """Write chunks with their KV entries to a tar file, for `braid store import` elsewhere.

    The system prompts that entries were computed after go with them. If the environment variable BRAID_ARCHIVE_KEY is
    set, the archive is signed with it (HMAC-SHA256).
    """
    with open_store(store) as opened, steps_bar("exporting") if out.shows_progress else nullcontext() as bar:
        ids = [row.id for row in select(StoredChunks(opened, namespace), names)] if names else None
        done = export_chunks(opened, file, namespace, ids=ids, key=os.environ.get(KEY) or None, on_progress=bar)
    _report(out, done, f"{_held(done)}, {size(done.bytes)}{', signed' if done.authenticated else ''}")


def import_archive(
    out: Output,
    file: Annotated[Path, typer.Argument(help="An archive that `braid store export` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Move names here that belong to other texts.")] = False,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Accept KV entries of models that this store has none of.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Register an archive's chunks in their namespaces, and store their KV entries.

    Every byte is verified before anything is imported. If the environment variable BRAID_ARCHIVE_KEY is set, the
    archive must be signed with it. Without it, import only what you trust: whoever wrote an archive chose the caches.
    """
    if not file.exists():
        raise NotFoundError(f"No archive at {str(file)!r}. `braid store export FILE` makes one.")
    with ChunkStore(store_folder(store), index=index_folder()) as opened:
        done = import_chunks(opened, file, replace=replace, any_model=any_model, key=os.environ.get(KEY) or None)
    _report(out, done, f"{_held(done)}; new: {counted(done.new_chunks, 'chunk')}, {done.new_entries:,} of the entries")


def _held(done: Moved) -> str:
    return f"{counted(done.chunks, 'chunk')}, {counted(done.entries, 'entry', 'entries')}"


def _report(out: Output, done: Moved, words: str) -> None:
    if out.json:
        out.document(asdict(done))
    else:
        out.text(words)
