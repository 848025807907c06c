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
"""Distances that are tried, in tokens. A fact is a sentence of so many in some models' eyes; in others its words do."""


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

    def ranked(rules: Sequence[Guided], before: int) -> list[Guided]:
        modes = {str(rule): rule for rule in rules}
        found = bench.divergences(cases, list(modes), lambda done, total: on_progress(before + done, 2 * total))
        means = {mode: fmean(found[mode]) for mode in modes}
        if len(set(means.values())) == 1:
            raise InputError(
                "calibrate must have questions over at least two context chunks, because the first one behind the "
                "system prompt is never repaired; these tell no way of choosing from another. Ask over more chunks."
            )
        return [modes[mode] for mode in sorted(modes, key=lambda mode: means[mode])]

    near = ranked([Guided(near=near) for near in NEAR], 0)[0].near
    best = ranked([Guided(layers=(layer,), near=near) for layer in range(layers)], len(cases))[:TAKEN]
    return Guided(layers=tuple(sorted(layer for rule in best for layer in rule.layers)), near=near)
