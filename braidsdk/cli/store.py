"""`braid store check` looks at everything that a store holds. It loads no model."""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from braidsdk.cli.exits import INCOMPATIBLE
from braidsdk.cli.opening import open_store
from braidsdk.cli.options import StoreOption
from braidsdk.cli.output import Output, counted
from braidsdk.progress import steps_bar

_SHOWN = 20
"""The most damaged entries that are named."""


def check(
    out: Output,
    read_data: Annotated[
        str, typer.Option("--read-data", metavar="SHARE", help="Of how many entries every byte is read, such as 10%.")
    ] = "0%",
    store: StoreOption = None,
) -> None:
    """Check the index, all texts, and every entry's file.

    Of each file the header is verified, with --read-data 100% every byte too. Nothing is changed: a damaged entry is
    set aside when it is read, and computed again. Ends with 4 if anything is damaged.
    """
    share = _share(read_data)
    with open_store(store) as opened, steps_bar("checking") if out.shows_progress else nullcontext() as bar:
        found = opened.check(share, bar)
    if out.json:
        out.document({"sound": found.is_sound, **asdict(found)})
    else:
        for trouble in found.index:
            out.text(f"index: {trouble}")
        for digest, why in found.damaged[:_SHOWN]:
            out.text(f"entry {digest}: {why}")
        if len(found.damaged) > _SHOWN:
            out.text(f"... and {len(found.damaged) - _SHOWN:,} more")
        stray = f"; {counted(len(found.stray), 'file')} of killed processes" if found.stray else ""
        words = "sound" if found.is_sound else f"{counted(len(found.damaged), 'damaged entry', 'damaged entries')}"
        out.text(f"{counted(found.entries, 'entry', 'entries')}, {found.read:,} read whole: {words}{stray}")
    if not found.is_sound:
        raise typer.Exit(INCOMPATIBLE)


def _share(text: str) -> float:
    """A share from text such as "10%" or "0.1"."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise typer.BadParameter(f"must be from 0% to 100%; got {text!r}.", param_hint="--read-data")
    return number
