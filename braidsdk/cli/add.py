"""`braid add` registers texts as chunks, and computes their KV entries into the store."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Annotated

import typer

from braidsdk.cli.exits import FAILED, INTERRUPTED
from braidsdk.cli.opening import open_braid, open_store
from braidsdk.cli.options import (
    TINY,
    DeviceOption,
    DtypeOption,
    ModelOption,
    NamespaceOption,
    StoreOption,
    WeightsOption,
)
from braidsdk.cli.output import Output, counted
from braidsdk.cli.pieces import check_names, cut, left_behind, merged_metadata
from braidsdk.cli.sources import Reading, Source, Unread, read_sources
from braidsdk.errors import BraidError, InputError
from braidsdk.store import ChunkRow
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM, duration

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Added:
    """A registered piece. It is `new` if its text was not registered before."""

    id: str
    name: str | None
    tokens: int
    new: bool


def add(
    out: Output,
    files: Annotated[list[str], typer.Argument(help="Files, folders, globs such as 'docs/**/*.md', or - for stdin.")],
    name: Annotated[str | None, typer.Option("--name", help="Name of the text, if there is one file only.")] = None,
    system: Annotated[bool, typer.Option("--system", help="Register the texts as system prompts (level 0).")] = False,
    anchor: Annotated[
        str | None, typer.Option("--anchor", help="Name or id of the system prompt that the texts will follow.")
    ] = None,
    chunk_tokens: Annotated[
        int,
        typer.Option(
            "--chunk-tokens",
            min=0,
            help="Cut longer texts into pieces of at most this many tokens; 0 keeps files whole.",
        ),
    ] = CHUNK_TOKENS,
    globs: Annotated[
        list[str] | None,
        typer.Option(
            "--glob",
            help="Which files to take from folders, such as '*.md'; can be repeated.",
            show_default="text and source code",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Move names here that belong to other texts.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete chunks whose text is no longer in these files and folders.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Register nothing if any text would be skipped.")] = False,
    model: ModelOption = TINY,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    namespace: NamespaceOption = "default",
) -> None:
    """Register texts: files, folders, globs or stdin.

    Long texts are cut at the ends of paragraphs or sentences; pieces are named guide.md#1, guide.md#2, and so on.
    System prompts are never cut. Run it again after a change: only what changed is computed.
    """
    if name is not None and len(files) > 1:
        raise _one_name_for(len(files))
    reading = _named(read_sources(files, globs or []), name)
    _report_unread(out, reading, strict)
    level = LEVEL_SYSTEM if system else LEVEL_CONTEXT
    with open_braid(
        out, model=model, store=store, device=device, dtype=dtype, weights=weights, namespace=namespace
    ) as braid:
        from braidsdk.cli.split import Splitter

        whole = system or chunk_tokens == 0
        split = (lambda text: [text]) if whole else Splitter(braid.count_tokens, chunk_tokens).split
        pieces = cut(reading.sources, split, namespace=namespace, level=level)
        with open_store(store) as index:
            held = index.list_chunks(namespace)
        if not replace:
            check_names(pieces, held)
        gone = left_behind(pieces, held, reading.folders, replaced=replace)

        texts = [piece.text for piece in pieces]
        estimate = braid.estimate(texts, anchor=anchor, level=level)
        out.note(str(estimate))
        started = perf_counter()
        try:
            registered = braid.register_many(
                texts,
                names=[piece.name for piece in pieces],
                metadata=merged_metadata(pieces, held),
                anchor=anchor,
                level=level,
                replace=True,
                progress=out.shows_progress,
                on_error="raise" if strict else "skip",
            )
        except KeyboardInterrupt:
            out.error("interrupted. What was computed is stored: run the same command again to continue.")
            raise typer.Exit(INTERRUPTED) from None
        took = perf_counter() - started
        known = {row.id for row in held}
        added = [Added(chunk.id, chunk.name, len(chunk.token_ids), chunk.id not in known) for chunk in registered]
        if prune and gone:
            braid.chunks.delete_many([row.id for row in gone])
    skipped = [(each.name or "stdin", str(each.error)) for each in registered.skipped]
    _report(out, added, reading.unread, skipped, gone, pruned=prune)
    new = {each.id: each.new for each in added}  # two files may have one text
    fresh = sum(new.values())
    done = f"; {estimate.tokens_to_compute:,} tokens computed in {duration(took)}" if estimate.tokens_to_compute else ""
    out.note(f"{fresh:,} new, {len(new) - fresh:,} unchanged{done}.")
    if not added:
        raise typer.Exit(FAILED)


def _named(reading: Reading, name: str | None) -> Reading:
    """Give the only text the name that was asked for."""
    if name is None:
        return reading
    if len(reading.sources) > 1:
        raise _one_name_for(len(reading.sources))
    return Reading(tuple(Source(name, each.path, each.text) for each in reading.sources), reading.unread, ())


def _one_name_for(files: int) -> InputError:
    return InputError(f"--name must be given for one file only; got {files:,}. Without it, files keep their own names.")


def _report_unread(out: Output, reading: Reading, strict: bool) -> None:
    """Report which files hold no text.

    Raises:
        BraidError: there are such files, and `strict`; or nothing is left.
    """
    for each in [] if strict else reading.unread:
        out.note(f"braid: skipped {each}")
    if reading.unread and (strict or not reading.sources):
        some = "; ".join(map(str, reading.unread[:10])) + ("; ..." if len(reading.unread) > 10 else "")
        raise BraidError(f"These files hold no text: {some}. Leave them out, or convert them to UTF-8.")
    if not reading.sources:
        raise BraidError("No text files found. Choose files of a folder with --glob, as in --glob '*.xyz'.")


def _report(
    out: Output,
    added: Sequence[Added],
    unread: Sequence[Unread],
    skipped: Sequence[tuple[str, str]],
    gone: Sequence[ChunkRow],
    *,
    pruned: bool,
) -> None:
    if out.json:
        left = [(each.path, each.reason) for each in unread] + list(skipped)
        out.document(
            {
                "chunks": [asdict(each) for each in added],
                "skipped": [{"name": name, "reason": reason} for name, reason in left],
                "gone": [{"id": row.id, "name": row.name} for row in gone],
                "pruned": pruned and bool(gone),
            }
        )
        return
    rows = [(each.id, f"{each.tokens:>6} tokens", "new" if each.new else "", each.name or "") for each in added]
    out.table(("id", "tokens", "", "name"), rows)
    for name, reason in skipped:
        out.note(f"braid: skipped {name}: {reason}")
    if gone:
        some = ", ".join(row.name or row.id[:8] for row in gone[:5]) + (", ..." if len(gone) > 5 else "")
        what = "deleted" if pruned else "still registered, and still read by answers. --prune deletes them"
        out.note(f"{counted(len(gone), 'chunk')} no longer in these files ({some}): {what}.")
