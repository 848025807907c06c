"""`BRAID_VERBOSE_KERNELS=1` shows a table of the model's operations on stderr when the process ends."""

import atexit
import os
import sys
from collections.abc import Mapping

from braidsdk.kernels import measure
from braidsdk.kernels.measure import Total

VARIABLE = "BRAID_VERBOSE_KERNELS"

_NOTE = """\
time: each call is measured alone; on a GPU without CUDA graphs, and with none of its data in the L2 cache.
bytes: weights, activations, results and pages of KV memory, counted from their shapes."""


def begin() -> None:
    """If the variable says so, measure from now on, and show the table at the end. Safe to call twice."""
    if os.environ.get(VARIABLE, "").lower() in ("", "0", "false", "no", "off") or measure.measuring():
        return
    measure.start()
    atexit.register(lambda: sys.stderr.write(table(measure.totals())))


def table(totals: Mapping[tuple[str, str], Total]) -> str:
    """The table as text, with a row for each operation and path."""
    rows = [("operation", "path", "calls", "ms in all", "us a call", "MB a call", "GB/s")]
    rows += [(*key, f"{total.calls:,}", *_rates(total)) for key, total in totals.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    untimed = sum(total.calls - total.timed for total in totals.values())
    if untimed:
        lines.append(f"{untimed:,} calls were launched too slowly to be timed, as when a kernel is compiled.")
    return "\n".join((*lines, _NOTE, ""))


def _rates(total: Total) -> tuple[str, str, str, str]:
    moved = total.bytes / total.calls
    if not total.timed:
        return "-", "-", f"{moved / 1e6:,.2f}", "-"
    each = total.seconds / total.timed
    return f"{each * total.calls * 1e3:,.1f}", f"{each * 1e6:,.1f}", f"{moved / 1e6:,.2f}", f"{moved / each / 1e9:,.1f}"
