"""Drawing with matplotlib, which the extra `viz` installs.

Knows nothing about answers and chunks.
"""

from collections.abc import Sequence
from typing import Any

from braidsdk.errors import BraidError


def heat_map(ax: Any, columns: Sequence[str], rows: Sequence[str], shares: Sequence[Sequence[float]]) -> Any:
    """Draw shares from 0 to 1.

    Args:
        ax: matplotlib's axes; None makes a figure of a size that fits.
        columns, rows: their names.
        shares: [rows, columns].

    Returns:
        The axes.

    Raises:
        BraidError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BraidError(
            'Plots must be drawn by matplotlib; it can\'t be imported here. Run pip install "braidsdk[viz]".'
        ) from error
    if ax is None:
        size = (2.5 + 0.28 * len(columns), 1.2 + 0.28 * len(rows))
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    image = ax.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    names = [_plain(name) for name in columns]
    ax.set_xticks(range(len(columns)), names, rotation=90, family="monospace")
    ax.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    ax.set_xlabel("tokens of the answer")
    ax.figure.colorbar(image, ax=ax, label="share of attention")
    return ax


def _plain(text: str) -> str:
    """A name that matplotlib draws as it is: dollar signs would begin a formula."""
    shown = text.replace("\n", "⏎").replace("$", r"\$")
    return "".join(char if char.isprintable() else " " for char in shown)
