"""Finds how `guided` says best which tokens to compute again.

That differs from model to model, so no share of the depth is taken for granted: whether the tokens around an attended
one have to be computed with it, and which layers' attention counts.
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

NEAR = (0, 12)
"""Distances that are tried, in tokens. Some models need the words around an attended one, others lose by them."""


def calibration(bench: Bench, cases: Sequence[Case], layers: int, on_progress: Callable[[int, int], None]) -> Guided:
    """How `guided` leads to the lowest mean KL: first the distance, over the layers that it looks at uncalibrated; then
    with it the layers whose own attention, each alone, is best.

    Args:
        bench: measures them.
        cases: what is asked.
        layers: how many layers the model has.
        on_progress: called with the cases done and those to be done; each is done twice.

    Returns:
        The rule with its layers, ascending, and its distance.

    Raises:
        InputError: nothing of these cases can be repaired.
        BraidError: what `Context.ask` raises.
    """

    def means(rules: Sequence[Guided], before: int) -> list[float]:
        modes = [str(rule) for rule in rules]
        found = bench.divergences(cases, modes, lambda done, total: on_progress(before + done, 2 * total))
        return [fmean(found[mode]) for mode in modes]

    of_distances = means([Guided(near=near) for near in NEAR], 0)
    near = NEAR[of_distances.index(min(of_distances))]  # of equal ones the shorter
    of_layers = means([Guided(layers=(layer,), near=near) for layer in range(layers)], len(cases))
    if len(set(of_layers)) == 1:
        raise InputError(
            "calibrate must have questions over at least two context chunks, because the first one behind the system "
            "prompt is never repaired; these tell no layer from another. Ask over more chunks."
        )
    best = sorted(range(layers), key=of_layers.__getitem__)[:TAKEN]
    return Guided(layers=tuple(sorted(best)), near=near)
