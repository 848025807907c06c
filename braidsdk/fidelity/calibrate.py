"""Finds the layers whose attention says best which tokens to compute again.

Which layers these are differs from model to model, so no share of the depth is taken for granted.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from braidsdk.compose.repairs import Guided
from braidsdk.errors import InputError
from braidsdk.fidelity.measure import Bench, Case

QUESTIONS = 30
"""Questions that it takes at most."""

TAKEN = 3
"""Layers that are taken, or all of a model with fewer."""


def best_layers(
    bench: Bench, cases: Sequence[Case], layers: int, on_progress: Callable[[int, int], None]
) -> tuple[int, ...]:
    """The layers of a model whose own attention, each alone, leads to the lowest mean KL, ascending.

    Args:
        bench: measures them.
        cases: what is asked.
        layers: how many layers the model has.
        on_progress: called with the cases done and those to be done.

    Raises:
        InputError: nothing of these cases can be repaired.
        BraidError: what `Context.ask` raises.
    """
    modes = {str(Guided(layers=(layer,))): layer for layer in range(layers)}
    found = bench.divergences(cases, list(modes), on_progress)
    means = {mode: fmean(found[mode]) for mode in modes}
    if len(set(means.values())) == 1:
        raise InputError(
            "calibrate must have questions over at least two context chunks, because the first one behind the system "
            "prompt is never repaired; these tell no layer from another. Ask over more chunks."
        )
    ranked = sorted(modes, key=lambda mode: means[mode])
    return tuple(sorted(modes[mode] for mode in ranked[:TAKEN]))
