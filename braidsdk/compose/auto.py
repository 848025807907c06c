"""The mode "auto": the cheapest of those that were measured to agree enough with full prefill. Touches no tensor."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from braidsdk.errors import InputError, shown
from braidsdk.types import Certificate, Mode

UNCALIBRATED: Mode = "anchored"
"""What `auto` is where nothing was measured that fits."""

_TEXT = re.compile(r"auto(?:\((?:\s*min_agreement\s*=)?([^=,]*)\))?", re.ASCII)
"""No two repetitions stand side by side, so that no text takes long: servers pass on what strangers send."""


@dataclass(frozen=True)
class Auto:
    """The cheapest mode that agrees with full prefill in enough tokens, by the certificates of `Braid.fidelity`.

    Attributes:
        min_agreement: the share of tokens at which the mode's likeliest one has to be full prefill's.
    """

    min_agreement: float = 0.98
    name: ClassVar[str] = "auto"

    def __str__(self) -> str:
        return f"{self.name}({self.min_agreement:g})"


def parse_auto(mode: str) -> Auto | None:
    """What a text such as "auto" or "auto(min_agreement=0.95)" stands for; None if it does not name this mode.

    Raises:
        InputError: its argument can't be used.
    """
    found = _TEXT.fullmatch(mode.strip())
    if found is None:
        if re.match(r"\s*auto\(", mode):
            raise InputError(f"mode 'auto' must have the form auto(min_agreement=0.98); got {shown(mode)}.")
        return None
    if found[1] is None:
        return Auto()
    try:
        agreement = float(found[1])
    except ValueError:
        agreement = -1.0
    if not 0 <= agreement <= 1:
        raise InputError(f"min_agreement of mode 'auto' must be a number from 0 to 1; got {shown(mode)}.")
    return Auto(agreement)


def choose(auto: Auto, certificates: Sequence[Certificate], chunks: int, *, anchor: bool) -> tuple[str, str]:
    """The mode for compositions of so many context chunks, and why it is this one.

    If no measured mode agrees enough, it is "exact", which every measurement includes.

    Args:
        auto: what is asked for.
        certificates: those of the model and namespace, the newest one of a mode and a range of chunks first.
        chunks: how many context chunks are composed.
        anchor: whether a system prompt stands first.
    """
    fitting: dict[str, Certificate] = {}
    for each in certificates:
        if each.fits(chunks, anchor=anchor):
            fitting.setdefault(each.mode, each)
    if not fitting:
        return (
            UNCALIBRATED,
            f"{auto} is uncalibrated: fidelity has not measured this model with {chunks} context chunks",
        )
    enough = [each for each in fitting.values() if each.top1 >= auto.min_agreement]
    if not enough:
        best = max(fitting.values(), key=lambda each: each.top1)
        return "exact", f"{auto} takes full prefill, because no measured mode agrees so often; the best is {best}"
    chosen = min(enough, key=lambda each: (each.budget, -each.top1))
    return chosen.mode, f"{auto} takes {chosen}"
