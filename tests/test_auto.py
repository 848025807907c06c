"""The mode "auto", which is the default, and the layers that `guided` looks at."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from braidsdk import Auto, Braid, Certificate, Chunk, Guided, Linked
from braidsdk.compose.auto import choose, parse_auto
from braidsdk.errors import InputError, UnknownModeError
from braidsdk.fidelity import calibrate
from braidsdk.fidelity.measure import Bench, Case

RULES = "You answer questions from the documents."
TEXTS = [f"The capital of {land} is {city}." for land, city in (("Aistonia", "Flubarg"), ("Belmora", "Plonk"))]
ASKED = [f"What is the capital of {land}?" for land in ("Aistonia", "Belmora")]


def registered(braid: Braid) -> list[Chunk]:
    rules = braid.register_system(RULES)
    return [rules, *braid.register_many(TEXTS, anchor=rules, progress=False)]


def certificate(mode: str, top1: float, budget: float, chunks: Sequence[int] = (1, 9)) -> Certificate:
    first, last = chunks
    return Certificate(
        mode, "w", "t", "float32", "default", first, last, True, 50, 0.1, 0.2, top1, None, None, budget, 0.0
    )


MEASURED = [
    certificate("exact", 1.0, 1.0),
    certificate("anchored", 0.9, 0.0),
    certificate("guided(0.15)", 0.97, 0.16),
    certificate("linked(16)", 0.95, 0.05),
    certificate("guided(0.3)", 0.99, 0.31),
]


@pytest.mark.parametrize(
    ("agreement", "mode"),
    [(0.5, "anchored"), (0.9, "anchored"), (0.93, "linked(16)"), (0.96, "guided(0.15)"), (0.98, "guided(0.3)")],
)
def test_the_cheapest_mode_that_agrees_enough_is_taken(agreement: float, mode: str) -> None:
    taken, why = choose(Auto(agreement), MEASURED, 4, anchor=True)
    assert taken == mode
    assert why.startswith(f"auto({agreement:g}) takes {mode}: KL")


def test_without_a_measured_mode_that_agrees_it_is_full_prefill() -> None:
    assert choose(Auto(0.995), MEASURED, 4, anchor=True)[0] == "exact"
    taken, why = choose(Auto(0.995), MEASURED[1:], 4, anchor=True)
    assert taken == "exact"
    assert "no measured mode agrees so often; the best is guided(0.3)" in why


def test_certificates_of_other_numbers_of_chunks_do_not_count() -> None:
    for chunks, mode in ((1, "linked(16)"), (9, "linked(16)"), (10, "anchored"), (0, "anchored")):
        assert choose(Auto(0.93), MEASURED, chunks, anchor=True)[0] == mode
    assert (
        "is uncalibrated: fidelity has not measured this model with 10 context chunks"
        in choose(Auto(), MEASURED, 10, anchor=True)[1]
    )


def test_the_newest_certificate_of_a_mode_counts() -> None:
    worse = certificate("linked(16)", 0.91, 0.05, (2, 6))
    assert choose(Auto(0.93), [worse, *MEASURED], 4, anchor=True)[0] == "guided(0.15)"
    assert choose(Auto(0.93), [*MEASURED, worse], 4, anchor=True)[0] == "linked(16)"
    assert choose(Auto(0.93), [worse, *MEASURED], 7, anchor=True)[0] == "linked(16)"


@pytest.mark.parametrize("text", ["auto(0.9)", " auto( min_agreement = 0.9 ) ", "auto(9e-1)"])
def test_auto_is_read_from_text(text: str) -> None:
    assert parse_auto(text) == Auto(0.9)


def test_no_text_takes_long_to_read() -> None:
    script = "from braidsdk.compose.auto import parse_auto; parse_auto('auto(' + ' ' * 100_000 + '==')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "InputError" in done.stderr


def test_modes_that_are_no_auto() -> None:
    assert parse_auto("auto") == Auto(0.98)
    assert parse_auto(str(Auto(0.5))) == Auto(0.5)
    assert parse_auto("autos") is None
    assert parse_auto("anchored") is None


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("auto(1.5)", InputError, "min_agreement of mode 'auto' must be a number from 0 to 1"),
        ("auto(nan)", InputError, "min_agreement"),
        ("auto()", InputError, "min_agreement"),
        ("auto(x=1)", InputError, "the form auto"),
        ("auto(0.5, 2)", InputError, "the form auto"),
        ("aouto", UnknownModeError, "Did you mean 'auto'?"),
        (Auto(2.0), InputError, "min_agreement"),
        (Guided(2.0), InputError, "ratio of mode 'guided'"),
        (Guided("0.15"), InputError, "must have numbers as its arguments"),  # type: ignore[arg-type]
        (Guided(None), InputError, "must have numbers as its arguments"),  # type: ignore[arg-type]
        (Guided(layers=3), InputError, "must have numbers as its arguments"),  # type: ignore[arg-type]
        (Guided(shift="yes"), InputError, "must have numbers as its arguments"),  # type: ignore[arg-type]
        (3.5, UnknownModeError, "got 3.5"),
        (Guided(0.5, (9,)), InputError, "layers of mode 'guided(0.5, layers=9)' must be below 3"),
    ],
)
def test_what_can_not_be_used(random_braid: Braid, mode: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
        random_braid.compose(registered(random_braid), mode=mode)  # type: ignore[arg-type]


def test_modes_are_objects_too(random_braid: Braid) -> None:
    chunks = registered(random_braid)
    for mode in (Guided(0.5, shift=True), Linked(3), Guided(0.2, (0, 2))):
        one, other = (random_braid.compose(chunks, mode=each) for each in (mode, str(mode)))
        assert one.mode == other.mode == str(mode)
        assert one.ask("Well?", max_new_tokens=4).token_ids == other.ask("Well?", max_new_tokens=4).token_ids


def test_the_default_is_auto_and_says_that_nothing_was_measured(random_braid: Braid) -> None:
    context = random_braid.compose(registered(random_braid))
    assert context.mode == "anchored"
    (note,) = context.explain().notes
    assert note.startswith("auto(0.98) is uncalibrated")
    assert random_braid.compose(registered(random_braid), mode="anchored").explain().notes == ()


@pytest.mark.filterwarnings("ignore:Weights in int8")
def test_what_was_measured_decides(other: Callable[..., Braid]) -> None:
    with other() as braid:
        chunks = registered(braid)
        report = braid.fidelity(chunks, ASKED, ["anchored", "blended(1)"], max_new_tokens=4)
        assert report["anchored"].top1.value < 0.98 <= report["blended(1)"].top1.value
        assert "By this measurement auto(0.98) takes exact: KL 0 to full prefill, 100.0% have" in str(report)
        assert braid.compose(chunks).mode == "exact", "blended(1) computes all tokens, and chooses besides"
        assert braid.compose(chunks, mode="auto(0)").mode == "anchored"
        assert braid.compose(chunks[:2]).mode == "anchored", "one chunk was not measured"
        assert braid.ask("Well?", chunks=chunks, max_new_tokens=1).fidelity.mode == "exact"
    with other(weights="int8") as braid:
        assert braid.compose(registered(braid)).mode == "anchored", "another model"
    with other() as braid:
        assert braid.compose(registered(braid)).mode == "exact", "a later process"
    with other(namespace="else") as braid:
        assert braid.compose(registered(braid)).mode == "anchored", "another corpus"


def test_auto_is_no_mode_to_measure(random_braid: Braid) -> None:
    with pytest.raises(InputError, match="got auto itself"):
        random_braid.fidelity(registered(random_braid), ASKED, ["anchored", "auto"])


# the layers that guided looks at


@pytest.mark.parametrize(("near", "other", "worse"), [(0, 12, 0.5), (12, 0, 0.5), (0, 12, 0.0)])
def test_the_distance_and_the_layers_with_the_lowest_kl_are_taken(
    near: int, other: int, worse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl = {f"guided(0.15, near={near})": [0.5, 0.5], f"guided(0.15, near={other})": [0.5 + worse, 0.5]}
    of_layers = ([5.0, 1.0], [2.0, 2.0], [1.0, 9.0], [0.0, 5.0], [2.0, 0.5])
    kl |= {f"guided(0.15, layers={layer}, near={near})": each for layer, each in enumerate(of_layers)}
    asked: list[str] = []

    def measured(_: Bench, cases: Sequence[Case], modes: Sequence[str], on_progress: object) -> dict[str, list[float]]:
        asked.extend(modes)
        return {mode: kl[mode] for mode in modes}

    monkeypatch.setattr(Bench, "divergences", measured)
    found = calibrate.calibration(Bench.__new__(Bench), [], 5, lambda *_: None)
    assert found == Guided(layers=(1, 3, 4), near=near)
    assert sorted(asked) == sorted(kl)


@pytest.mark.filterwarnings("ignore:Weights in int8")
def test_calibrated_layers_are_the_model_s(other: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "TAKEN", 2)
    seen: list[tuple[int, int]] = []
    with other() as braid:
        chunks = registered(braid)
        assert braid.compose(chunks, mode="guided(0.2)").mode == "guided(0.2)"
        plain = braid.fidelity(chunks, ASKED, ["guided(0.2)"], max_new_tokens=4)
        report = braid.fidelity(
            chunks, ASKED, ["guided(0.2)"], max_new_tokens=4, calibrate=True, on_progress=lambda *now: seen.append(now)
        )
        assert seen == [(done, 6) for done in (0, 1, 2, 2, 3, 4, 4, 5, 6)]
        layers = braid.compose(chunks, mode=Guided(0.2)).mode
        _, taken, near = layers.removesuffix(")").split(", ")
        modes = [f"guided(0.15, layers={layer}, {near})" for layer in range(3)]
        alone = braid.fidelity(chunks, ASKED, modes, max_new_tokens=4)
        worst = max(modes, key=lambda mode: alone[mode].kl.value)
        assert taken == "layers=" + "/".join(str(layer) for layer in range(3) if modes[layer] != worst)
        assert report["guided(0.2)"] is report[layers]
        assert plain["guided(0.2)"].mode == "guided(0.2)"
        assert braid.compose(chunks, mode="guided(0.2, layers=0)").mode == "guided(0.2, layers=0)"
        assert braid.ask("Well?", chunks=chunks, mode="guided(0.2)", max_new_tokens=1).fidelity.mode == layers
    with other(namespace="else") as braid:
        assert braid.compose(registered(braid), mode="guided(0.2)").mode == layers
    with other(weights="int8") as braid:
        assert braid.compose(registered(braid), mode="guided(0.2)").mode == "guided(0.2)"


def test_calibration_needs_something_to_repair(other: Callable[..., Braid]) -> None:
    with other() as braid:
        chunks = registered(braid)[:2]
        with pytest.raises(InputError, match="at least two context chunks"):
            braid.fidelity(chunks, ASKED, ["guided(0.2)"], calibrate=True, max_new_tokens=2)
        assert braid.compose(chunks, mode="guided(0.2)").mode == "guided(0.2)", "nothing is kept"


def test_calibration_goes_on_where_it_stopped(other: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch) -> None:
    with other() as braid:
        chunks = registered(braid)

        def stop(done: int, _: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            braid.fidelity(chunks, ASKED, ["guided(0.2)"], calibrate=True, max_new_tokens=4, on_progress=stop)
        assert braid.compose(chunks, mode="guided(0.2)").mode == "guided(0.2)", "nothing is kept of half a calibration"
        composed: list[str] = []
        compose = type(braid).compose

        def watched(self: Braid, given: Any, *, mode: Any = None, keep: bool | None = None) -> Any:
            composed.append(f"{mode}")
            return compose(self, given, mode=mode, keep=keep)

        monkeypatch.setattr(type(braid), "compose", watched)
        braid.fidelity(chunks, ASKED, ["guided(0.2)"], calibrate=True, max_new_tokens=4)
    assert composed.count("guided(0.15, near=12)") == 1, "the first question is known"


def test_layers_are_looked_at_alone(random_braid: Braid) -> None:
    chunks = registered(random_braid)
    answers = [
        random_braid.compose(chunks, mode=mode).next_token_logits(ASKED[0])
        for mode in ("guided(0.3)", "guided(0.3, layers=1)", "guided(0.3, layers=0)", "guided(0.3, layers=2)")
    ]
    assert float((answers[0] - answers[1]).abs().max()) < 1e-4  # rounding; logits reach about 2
    assert float((answers[2] - answers[3]).abs().max()) > 1e-2
    budgets = [
        random_braid.ask(ASKED[0], chunks=chunks, mode=mode, max_new_tokens=1).usage.budget
        for mode in ("guided(0, layers=0)", "guided(0, layers=2)", "guided(0)")
    ]
    assert budgets[1] == pytest.approx(3 * budgets[0])
    assert budgets[2] == pytest.approx(2 * budgets[0])
