"""`braid store ...` checks and mends a store. It loads no model."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from braidsdk.cli.exits import INCOMPATIBLE
from braidsdk.cli.opening import existing_store, open_store
from braidsdk.cli.options import StoreOption
from braidsdk.cli.output import Output, counted
from braidsdk.progress import steps_bar
from braidsdk.store import repair

_SHOWN = 20
"""The most files of a kind that are named."""


ReadDataOption = Annotated[
    str, typer.Option("--read-data", metavar="SHARE", help="Of how many entries every byte is read, such as 10%.")
]


def check(out: Output, read_data: ReadDataOption = "0%", store: StoreOption = None) -> None:
    """Check the index, all texts, and the files of chunks and entries.

    Of an entry's file the header is verified, with --read-data 100% every byte too. Nothing is changed. Ends with 4 if
    anything is damaged; `braid store repair` mends it.
    """
    share = _share(read_data)
    with open_store(store) as opened, steps_bar("checking") if out.shows_progress else nullcontext() as bar:
        found = opened.check(share, bar)
    if out.json:
        out.document({"sound": found.is_sound, **asdict(found)})
    else:
        for trouble in found.index:
            out.text(f"index: {trouble}")
        _show(out, "entry", found.damaged)
        _show(out, "chunk", found.behind)
        stray = f"; {counted(len(found.stray), 'file')} of killed processes" if found.stray else ""
        bad = [
            counted(len(found.damaged), "damaged entry", "damaged entries") if found.damaged else "",
            f"{counted(len(found.behind), 'file')} of chunks to write again" if found.behind else "",
            "a damaged index" if found.index else "",
        ]
        words = "sound" if found.is_sound else ", ".join(filter(None, bad))
        held = f"{counted(found.chunks, 'chunk')}, {counted(found.entries, 'entry', 'entries')}"
        out.text(f"{held}, {found.read:,} read whole: {words}{stray}")
    if not found.is_sound:
        raise typer.Exit(INCOMPATIBLE)


def repair_store(out: Output, read_data: ReadDataOption = "0%", store: StoreOption = None) -> None:
    """Mend the store: rebuild a lost or damaged index from the files, and make the files agree with a sound one.

    Names and metadata come back too. Damaged entries are moved to damaged/, and are computed again when they are asked
    for. A damaged index is moved to damaged/ as well; the next deletion removes it there.
    """
    share, folder = _share(read_data), existing_store(store)
    with steps_bar("repairing") if out.shows_progress else nullcontext() as bar:
        done = repair(folder, share, bar)
    if out.json:
        out.document(asdict(done))
        return
    if done.rebuilt:
        found = done.rebuilt
        held = f"{counted(found.chunks, 'chunk')} and {counted(found.entries, 'entry', 'entries')}"
        out.text(f"rebuilt the index from the files: {held}")
        _show(out, "set aside", [(path.name, why) for path, why in found.damaged])
        _show(
            out,
            "without its names and metadata: chunk",
            [(each, "its file was damaged") for each in found.without_names],
        )
    _show(out, "set aside: entry", done.damaged)
    _show(out, "written again: chunk", done.written)
    if done.removed:
        out.text(f"removed {counted(len(done.removed), 'file')} of killed processes")
    if not (done.rebuilt or done.damaged or done.written or done.removed):
        out.text("nothing was damaged")


def _show(out: Output, what: str, found: Sequence[tuple[str, str]]) -> None:
    for each, why in found[:_SHOWN]:
        out.text(f"{what} {each}: {why}")
    if len(found) > _SHOWN:
        out.text(f"... and {len(found) - _SHOWN:,} more")


def _share(text: str) -> float:
    """A share from text such as "10%" or "0.1"."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise typer.BadParameter(f"must be from 0% to 100%; got {text!r}.", param_hint="--read-data")
    return number
