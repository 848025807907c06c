"""`braid ls`, `show`, `log`, `restore`, `pin` and `rm` work on registered chunks. None of them loads a model."""

import glob
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from braidsdk.cache.certificates import stored
from braidsdk.cli.opening import model_names, open_store
from braidsdk.cli.options import NamespaceOption, StoreOption
from braidsdk.cli.output import Output, ask_yes_no, counted, one_line
from braidsdk.cli.select import StoredChunks, is_glob, reading_order, select
from braidsdk.errors import InputError
from braidsdk.store import ChunkRow, ChunkStore
from braidsdk.types import size

_WORDS = "Names, ids or globs such as 'guide*'."
_START = 200  # the most characters of a text that one row shows


def ls(
    out: Output,
    pattern: Annotated[str | None, typer.Argument(help="Only names that match this glob, such as 'guide*'.")] = None,
    level: Annotated[int | None, typer.Option("--level", min=0, max=1, help="0: system prompts, 1: context.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-l", min=1, help="Show at most this many.")] = None,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
) -> None:
    """List registered chunks.

    Columns: name, level, start of the id, start of the text. Piped, they are separated by tabs, and the id is whole.
    """
    with open_store(store) as opened:
        wanted = pattern
        if pattern is not None and not is_glob(pattern):
            wanted = f"{pattern}*"
        elif pattern is not None and opened.find_chunk(namespace, pattern):  # a name goes before a glob, as in `rm`
            wanted = glob.escape(pattern)
        rows = opened.list_chunks(namespace, name=wanted, level=level, limit=limit)
        more = limit is not None and opened.count_chunks(namespace, name=wanted, level=level) - len(rows)
    rows = reading_order(rows)
    if out.json:
        out.document([_described(row) for row in rows])
        return
    shown = 8 if sys.stdout.isatty() else 32
    cells = [(row.name or "", str(row.level), row.id[:shown], one_line(row.text[:_START])) for row in rows]
    out.table(("name", "level", "id", "text"), cells, fill=3)
    if not rows:
        out.note(f"No chunks{f' match {pattern!r}' if pattern else ''} in namespace {namespace!r}.")
    if more:
        out.note(f"... and {more:,} more.")


def show(
    out: Output,
    names: Annotated[list[str] | None, typer.Argument(help=_WORDS)] = None,
    text: Annotated[bool, typer.Option("--text", help="Print only the text.")] = False,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
) -> None:
    """Show chunks: text, names, metadata, and the models that have KV entries of them.

    Without a name it shows the namespace's certificates: what `braid fidelity` measured. Columns: mode, context chunks,
    questions, mean KL to full prefill in nats, share of tokens with the same likeliest one, share of answers that
    contain the reference, budget, model, dtype.
    """
    with open_store(store) as opened:
        if not names:
            _show_certificates(out, opened, namespace)
            return
        rows = select(StoredChunks(opened, namespace), names)
        entries = [_entries(opened, row) for row in rows]
    if out.json:
        out.document([{**_described(row), "entries": its} for row, its in zip(rows, entries, strict=True)])
        return
    for number, (row, its) in enumerate(zip(rows, entries, strict=True)):
        if number and not text:
            out.text("")
        if not text:
            _print_head(out, row, its)
        out.text(row.text)


def log(
    out: Output,
    name: Annotated[str, typer.Argument(help="A chunk's name.")],
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
) -> None:
    """List what a name stands for and stood for, the newest first.

    Columns: since when and until when (UTC), start of the id, start of the text. Piped, they are separated by tabs, and
    the id is whole. `braid restore` lets the name stand for one of them again.
    """
    with open_store(store) as opened:
        versions = opened.versions(namespace, name)
        if not versions:
            StoredChunks(opened, namespace).get(name)  # says which names are close
            raise InputError(f"A name must be given; {name} is an id. Pass one of the chunk's names.")
        rows = opened.find_chunks(namespace, [each.chunk_id for each in versions])
    there = [(each, rows[each.chunk_id]) for each in versions if each.chunk_id in rows]
    if out.json:
        out.document([{"since": each.since, "until": each.until, **_described(row)} for each, row in there])
        return
    shown = 8 if sys.stdout.isatty() else 32
    cells = [
        (each.since[:19], (each.until or "now")[:19], row.id[:shown], one_line(row.text[:_START]))
        for each, row in there
    ]
    out.table(("since", "until", "id", "text"), cells, fill=3)


def restore(
    out: Output,
    name: Annotated[str, typer.Argument(help="A chunk's name.")],
    ident: Annotated[str | None, typer.Argument(metavar="[ID]", help="The chunk's id, or its start.")] = None,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
) -> None:
    """Let a name stand again for a chunk that it stood for.

    Without an id it is the one before the present one. `braid log NAME` lists them.
    """
    with open_store(store) as opened:
        known = dict.fromkeys(each.chunk_id for each in opened.versions(namespace, name))
        fits = [each for each in known if ident and each.startswith(ident.lower())]
        if len(fits) > 1:
            raise InputError(
                f"The start of an id must fit one chunk; {ident!r} fits {', '.join(fits[:5])}. Give more of it."
            )
        row = opened.restore_name(namespace, name, fits[0] if len(fits) == 1 else ident)
    if out.json:
        out.document(_described(row))
    else:
        out.text(f"{one_line(name)}\t{row.id}\t{one_line(row.text[:_START])}")


def pin(
    out: Output,
    names: Annotated[list[str], typer.Argument(help=_WORDS)],
    off: Annotated[bool, typer.Option("--off", help="Remove the pins.")] = False,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
) -> None:
    """Pin chunks: their KV entries stay when others are evicted to keep the store within its limits."""
    with open_store(store) as opened:
        rows = select(StoredChunks(opened, namespace), names)
        changed = [opened.update_chunk(namespace, row.id, pinned=not off) for row in rows]
    if out.json:
        out.document([_described(row) for row in changed])
        return
    for row in changed:
        out.text(f"{row.id}\t{one_line(row.name or '')}")
    out.note(f"{counted(len(changed), 'chunk')} {'unpinned' if off else 'pinned'}.")


def rm(
    out: Output,
    names: Annotated[list[str], typer.Argument(help=_WORDS)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
) -> None:
    """Delete chunks and every KV entry that depends on them.

    Asks for confirmation. Where there is no terminal to ask on, --yes is required.
    """
    with open_store(store) as opened:
        rows = select(StoredChunks(opened, namespace), names)
        if not yes:
            _confirm(rows)
        gone = opened.delete_chunks(namespace, [row.id for row in rows])
    if out.json:
        deleted = [{"id": row.id, "name": row.name} for row in rows]
        out.document({"deleted": deleted, "entries": len(gone.digests), "bytes": gone.bytes})
        return
    for row in rows:
        out.text(f"{row.id}\t{one_line(row.name or '')}")
    entries = counted(len(gone.digests), "KV entry", "KV entries")
    out.note(f"{counted(gone.chunks, 'chunk')} deleted, with {entries} of {size(gone.bytes)}.")


def _confirm(rows: Sequence[ChunkRow]) -> None:
    if not sys.stdin.isatty():
        raise InputError(
            f"Deleting {counted(len(rows), 'chunk')} must be confirmed; there is no terminal to ask on. Pass --yes."
        )
    some = ", ".join(one_line(row.name or row.id[:8]) for row in rows[:5])
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    if not ask_yes_no(f"Delete {some}{more}, and every KV entry that depends on them?"):
        raise typer.Exit(1)


def _show_certificates(out: Output, store: ChunkStore, namespace: str) -> None:
    found = stored(store, namespace)
    models = model_names(store, {each.weights for each in found})
    if out.json:
        out.document([{"model": models[each.weights], **asdict(each)} for each in found])
        return
    rows = [
        (
            each.mode,
            "-".join(map(str, dict.fromkeys((each.fewest_chunks, each.most_chunks)))),
            f"{each.questions:,}",
            f"{each.kl:.3f}",
            f"{each.top1:.1%}",
            "-" if each.contains is None else f"{each.contains:.1%}",
            f"{each.budget:.1%}",
            models[each.weights],
            each.dtype,
        )
        for each in found
    ]
    head = ("mode", "chunks", "questions", "KL", "likeliest", "contains", "budget", "model", "dtype")
    if rows:
        out.table(head, rows)
    else:
        out.note(f"No certificates in namespace {namespace!r}. `braid fidelity` makes them; `braid ls` lists chunks.")


def _described(row: ChunkRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "names": list(row.names),
        "namespace": row.namespace,
        "level": row.level,
        "metadata": row.metadata,
        "pinned": row.pinned,
        "text": row.text,
    }


def _entries(store: ChunkStore, row: ChunkRow) -> list[dict[str, Any]]:
    """The chunk's stored entries, and a miss for each model of the store that has none."""
    records = [(entry, json.loads(entry.record)) for entry in store.entries_of(row.namespace, row.id)]
    models = dict.fromkeys((group.weights, group.dtype) for group in store.stats(row.namespace).groups)
    names = model_names(store, [weights for weights, _ in models])
    before = store.find_chunks(row.namespace, [each for _, record in records for each in record["after"] if each])
    found: list[dict[str, Any]] = []
    for entry, record in records:
        model = (record["model"]["weights"], record["model"]["dtype"])
        models.pop(model, None)
        after = [before[each].name or each[:8] if each in before else each for each in record["after"]]
        head = {"hit": True, "model": names[model[0]], "dtype": model[1]}
        found.append({**head, "after": after, "tokens": entry.tokens, "bytes": entry.bytes})
    return found + [{"hit": False, "model": names[weights], "dtype": dtype} for weights, dtype in models]


def _print_head(out: Output, row: ChunkRow, entries: Sequence[Mapping[str, Any]]) -> None:
    facts = [
        ("name", ", ".join(map(one_line, row.names)) or "-"),
        ("id", row.id),
        ("level", "0 (system)" if row.level == 0 else f"{row.level} (context)"),
        ("metadata", json.dumps(row.metadata, ensure_ascii=False) if row.metadata else "-"),
    ]
    facts += [("KV entry", _entry_words(entry)) for entry in entries] or [("KV entry", "none stored")]
    for name, value in facts:
        out.text(f"{name + ':':<10} {value}")
    out.text("")


def _entry_words(entry: Mapping[str, Any]) -> str:
    model = f"{entry['model']} {entry['dtype']}"
    if not entry["hit"]:
        return f"miss, {model}"
    after = ", ".join("the bare header" if each is None else each for each in entry["after"])
    return f"hit,  {model}, {entry['tokens']:,} tokens, {size(entry['bytes'])}{f', after {after}' if after else ''}"
