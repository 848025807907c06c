"""`braid store ...` and `braid gc` look after a store. They load no model."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from braidsdk.cli.exits import INCOMPATIBLE
from braidsdk.cli.opening import existing_store, open_store
from braidsdk.cli.options import StoreOption
from braidsdk.cli.output import Output, counted
from braidsdk.errors import InputError
from braidsdk.progress import steps_bar
from braidsdk.settings import index_folder
from braidsdk.store import DAMAGED_S, WHOLE, Collected, Limit, repair
from braidsdk.types import size

DAY_S = 86_400.0

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
        done = repair(folder, share, bar, index=index_folder())
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
    if done.taken_in:
        out.text(f"taken in again: {counted(len(done.taken_in), 'entry', 'entries')} that the index had lost")
    if done.removed:
        out.text(f"removed {counted(len(done.removed), 'file')} of killed processes")
    if not (done.rebuilt or done.damaged or done.written or done.taken_in or done.removed):
        out.text("nothing was damaged")


def gc(
    out: Output,
    damaged_days: Annotated[
        float, typer.Option("--damaged-days", min=0, help="Remove files that were set aside longer ago than this.")
    ] = DAMAGED_S / DAY_S,
    store: StoreOption = None,
) -> None:
    """Keep the store within its limits, and remove what is left over.

    KV entries over a limit are evicted, those with the fewest recent uses per byte first; texts stay. Files of killed
    processes and old files in damaged/ are removed. Registering does the first, and the first opening of a day all.
    """
    with open_store(store) as opened:
        done = opened.collect(damaged_s=damaged_days * DAY_S)
    if out.json:
        out.document(asdict(done))
        return
    out.text(f"{counted(done.evicted, 'entry', 'entries')} of {size(done.evicted_bytes)} evicted")
    if done.strays or done.damaged:
        out.text(f"removed {counted(done.strays, 'stray file')} and {counted(done.damaged, 'damaged file')}")
    _note_over(out, done)


def _note_over(out: Output, done: Collected) -> None:
    if done.over_bytes:
        out.note(f"Still {size(done.over_bytes)} over a limit: what is left is pinned or in use.")


def limit(
    out: Output,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", metavar="SIZE", help='Such as 50GB, 1.5TB or "none".')
    ] = None,
    max_age: Annotated[str | None, typer.Option("--max-age", metavar="DAYS", help='Such as 30, or "none".')] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Limit one namespace instead of the whole store.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Limit how large the store may become and how long unused KV entries stay. Without an option, show the limits.

    What is over a limit is evicted at once. Pinned chunks' entries and all texts stay.
    """
    if namespace == "":
        raise typer.BadParameter("must not be empty; leave it out for the whole store.", param_hint="--namespace")
    with open_store(store) as opened:
        limits, name = opened.limits(), WHOLE if namespace is None else namespace
        before = limits.get(name, Limit())
        wanted = Limit(
            before.max_bytes if max_bytes is None else _bytes(max_bytes),
            before.max_age_s if max_age is None else _days(max_age),
        )
        if (max_bytes, max_age) != (None, None):
            done = opened.set_limit(wanted, name)
            out.note(f"{counted(done.evicted, 'entry', 'entries')} of {size(done.evicted_bytes)} evicted.")
            _note_over(out, done)
            limits = opened.limits()
    if out.json:
        out.document({each: asdict(limit) for each, limit in limits.items()})
        return
    for each, limit in limits.items() or {WHOLE: Limit()}.items():
        most = "no limit of bytes" if limit.max_bytes is None else f"at most {size(int(limit.max_bytes))}"
        age = "any age" if limit.max_age_s is None else f"at most {limit.max_age_s / DAY_S:g} days unused"
        out.text(f"{f'namespace {each}' if each else 'store'}: {most}, {age}")


def _bytes(text: str) -> float | None:
    """A number of bytes from text such as 50GB."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) *(k|m|g|t|ki|mi|gi|ti|)b?", text.strip().lower())
    if text.strip().lower() == "none":
        return None
    if not found:
        raise typer.BadParameter(f'must be a size such as 50GB, or "none"; got {text!r}.', param_hint="--max-bytes")
    return float(found[1]) * (1024.0 if "i" in found[2] else 1000.0) ** " kmgt".index(found[2][:1] or " ")


def _days(text: str) -> float | None:
    """Seconds from a number of days."""
    if text.strip().lower() == "none":
        return None
    try:
        return Limit(max_age_s=float(text.strip().lower().removesuffix("d")) * DAY_S).max_age_s
    except (ValueError, InputError):
        raise typer.BadParameter(
            f'must be a number of days, or "none"; got {text!r}.', param_hint="--max-age"
        ) from None


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
