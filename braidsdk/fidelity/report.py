"""What a measurement gave: a table for people, JSON for programs, a plot of quality against cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import time
from typing import Any

from braidsdk.compose.auto import Auto, choose
from braidsdk.compose.repairs import Repair
from braidsdk.errors import BraidError, InputError, shown
from braidsdk.fidelity import scores
from braidsdk.fidelity.bootstrap import (
    Estimate,
    Statistic,
    estimate,
    mean,
    mean_difference,
    median,
    p95,
    share_recovered,
)
from braidsdk.fidelity.measure import REFERENCE, Measured
from braidsdk.fidelity.outcomes import Outcome
from braidsdk.types import Certificate


@dataclass(frozen=True)
class ModeFidelity:
    """What was measured of one mode, over all questions. Each figure has its 95 % interval.

    Attributes:
        mode: the composition rule.
        kl: mean KL divergence of the next-token distributions from full prefill's, in nats, along full prefill's own
            answer.
        kl_p95: 95 % of the questions have at most this one.
        top1: share of tokens at which both have the same likeliest one.
        prefix: how many tokens the greedy answer and full prefill's begin with in common, on average.
        exact_match, f1, contains: the answers against the references, as means; None without references. See `scores`.
        new_not_found: share of answers that say that it is not in the documents where full prefill's does not.
        budget: what a call computes of the context, as a share of what full prefill computes.
        first_token_ms: median time to the first token. Caches are in memory; full prefill has none.
        faster: median of how many times sooner the first token comes than in full prefill.
        recovered: the share of the baseline's mean KL that this mode wins back; None without a baseline.
        worse: share of questions with a greater KL than the baseline's; None without a baseline.
        against: differences of means from the baseline's, by name of the figure. Empty without a baseline.
    """

    mode: str
    kl: Estimate
    kl_p95: Estimate
    top1: Estimate
    prefix: Estimate
    exact_match: Estimate | None
    f1: Estimate | None
    contains: Estimate | None
    new_not_found: Estimate
    budget: Estimate
    first_token_ms: Estimate
    faster: Estimate
    recovered: Estimate | None
    worse: Estimate | None
    against: Mapping[str, Estimate]


@dataclass(frozen=True)
class Setting:
    """What was measured, and on what.

    Attributes:
        model: what people call the model.
        weights, tokenizer: their fingerprints.
        dtype, device: what it was computed in, and where.
        namespace: the namespace of the chunks.
        given: how many questions there were to choose from.
        seed: of the sample and the intervals.
        baseline: the mode that others are compared with; None if it was not measured.
        not_found: what an answer holds that says that it is not in the documents.
        names: the modes as they were given, and how they are called with the layers that they look at.
    """

    model: str
    weights: str
    tokenizer: str
    dtype: str
    device: str
    namespace: str
    given: int
    seed: int
    baseline: str | None
    not_found: tuple[str, ...]
    names: Mapping[str, str]


@dataclass(frozen=True)
class FidelityReport:
    """What `Braid.fidelity` measured. `str()` of it is a table.

    Attributes:
        setting: what was measured, and on what.
        questions: how many questions were asked.
        with_references: how many of them have a reference.
        full_prefill_fails: share of these whose reference full prefill's own answer does not contain; None without
            references.
        fewest_chunks, most_chunks: how many context chunks they were asked over.
        anchor: whether a system prompt stood first in all of them.
        modes: full prefill, and then each mode.
        measured: each question with its outcomes.
    """

    setting: Setting
    questions: int
    with_references: int
    full_prefill_fails: float | None
    fewest_chunks: int
    most_chunks: int
    anchor: bool
    modes: tuple[ModeFidelity, ...]
    measured: tuple[Measured, ...]

    def __getitem__(self, mode: str | Repair) -> ModeFidelity:
        """What was measured of a mode, by the name that it was given or that it has in the table.

        Raises:
            InputError: it was not measured.
        """
        name = self.setting.names.get(str(mode), str(mode))
        for each in self.modes:
            if each.mode == name:
                return each
        names = ", ".join(each.mode for each in self.modes)
        raise InputError(f"mode must be one that was measured: {names}; got {shown(mode)}.")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types, with each question's outcomes."""
        outcomes = [
            {
                "number": each.case.number,
                "question": each.case.question.question,
                "answers": list(each.case.question.answers),
                "chunks": each.case.context_chunks,
                "modes": {mode: _listed(asdict(outcome)) for mode, outcome in each.outcomes.items()},
            }
            for each in self.measured
        ]
        return {
            **_listed(asdict(self.setting)),
            "questions": self.questions,
            "with_references": self.with_references,
            "full_prefill_fails": self.full_prefill_fails,
            "fewest_chunks": self.fewest_chunks,
            "most_chunks": self.most_chunks,
            "anchor": self.anchor,
            "modes": [asdict(each) for each in self.modes],
            "outcomes": outcomes,
        }

    def certificates(self) -> list[Certificate]:
        """What the store keeps of it: a certificate for each mode."""
        full, now = self.modes[0].contains, time()
        return [
            Certificate(
                mode=each.mode,
                weights=self.setting.weights,
                tokenizer=self.setting.tokenizer,
                dtype=self.setting.dtype,
                namespace=self.setting.namespace,
                fewest_chunks=self.fewest_chunks,
                most_chunks=self.most_chunks,
                anchor=self.anchor,
                questions=self.questions,
                kl=each.kl.value,
                kl_p95=each.kl_p95.value,
                top1=each.top1.value,
                contains=each.contains.value if each.contains else None,
                full_contains=full.value if full else None,
                budget=each.budget.value,
                measured_at=now,
            )
            for each in self.modes
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A column for each mode and a row for each figure: the head, and the rows."""
        rows = []
        for label, name, form in _FIGURES:
            values = [getattr(each, name) for each in self.modes]
            if any(values):
                rows.append([label, *(_cell(value, form) for value in values)])
        compared = [each for each in self.modes if each.against]
        if compared:
            base = self.setting.baseline
            rows.append([f"KL of {base} recovered", *(_cell(each.recovered, _percent) for each in self.modes)])
            rows.append([f"more KL than {base}", *(_cell(each.worse, _percent) for each in self.modes)])
            for label, name, form in _FIGURES:
                if any(name in each.against for each in compared):
                    cells = [_cell(each.against.get(name), partial(form, sign="+")) for each in self.modes]
                    rows.append([f"{label}, less {base}'s", *cells])
        return ["", *(each.mode for each in self.modes)], rows

    def __str__(self) -> str:
        setting = self.setting
        chunks = " to ".join(map(str, dict.fromkeys((self.fewest_chunks, self.most_chunks))))
        asked = f"{self.questions:,}" if self.questions == setting.given else f"{self.questions:,} of {setting.given:,}"
        lines = [
            f"{setting.model}, {setting.dtype} on {setting.device}: {asked} questions over {chunks} chunks; "
            "95 % intervals in brackets",
            "",
        ]
        head, rows = self.table()
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join((first, *others)).rstrip())
        if self.full_prefill_fails is not None:
            lines += [
                "",
                f"Full prefill itself does not give the reference to {self.full_prefill_fails:.0%} of "
                f"{self.with_references:,} question{'s' * (self.with_references != 1)}.",
            ]
        why = choose(Auto(), self.certificates(), self.most_chunks, anchor=self.anchor)[1]
        lines += ["", f"By this measurement {why}."]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw quality against cost, into a file whose suffix says the form: .png, .svg or .pdf.

        Raises:
            BraidError: matplotlib is not installed, or can't write the file.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BraidError('A plot needs the package matplotlib. Install it: pip install "braidsdk[viz]".') from error
        panels = [("KL to full prefill, nats", "kl", 1)]
        if self.with_references:
            panels.append(("answers that contain the reference, %", "contains", 100))
        figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
        for axes, (label, name, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for each in self.modes:
                value, cost = getattr(each, name), 100 * each.budget.value
                low, high = (scale * abs(end - value.value) for end in (value.low, value.high))
                axes.errorbar(cost, scale * value.value, yerr=[[low], [high]], fmt="o", capsize=3)
                axes.annotate(each.mode, (cost, scale * value.value), xytext=(6, 6), textcoords="offset points")
            axes.set(xlabel="context tokens computed per call, % of full prefill", ylabel=label)
            axes.margins(x=0.2)
            axes.grid(alpha=0.3)
        figure.suptitle(f"{self.setting.model}, {self.questions:,} questions")
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise BraidError(
                f"The plot must go to a .png, .svg or .pdf file that can be written; got {error}."
            ) from error


def make_report(setting: Setting, measured: Sequence[Measured]) -> FidelityReport:
    """Sum up what was measured.

    Args:
        setting: what was measured, and on what.
        measured: at least one question, each with outcomes of the same modes.
    """
    names = list(measured[0].outcomes)
    values = {name: _Values(measured, name, setting.not_found) for name in names}
    base = values.get(setting.baseline or "")
    told = [each for each in measured if each.case.question.answers]
    chunks = [each.case.context_chunks for each in measured]
    return FidelityReport(
        setting=setting,
        questions=len(measured),
        with_references=len(told),
        full_prefill_fails=1 - sum(values[REFERENCE].of["contains"]) / len(told) if told else None,
        fewest_chunks=min(chunks),
        most_chunks=max(chunks),
        anchor=all(each.case.anchor for each in measured),
        modes=tuple(values[name].summed_up(setting.seed, base) for name in names),
        measured=tuple(measured),
    )


class _Values:
    """A mode's values, question by question."""

    def __init__(self, measured: Sequence[Measured], mode: str, phrases: Sequence[str]) -> None:
        self.mode = mode
        own = [each.outcomes[mode] for each in measured]
        full = [each.outcomes[REFERENCE] for each in measured]
        told = [
            (each.outcomes[mode].text, each.case.question.answers) for each in measured if each.case.question.answers
        ]
        self.of: dict[str, list[float]] = {
            "kl": [each.kl for each in own],
            "top1": [each.top1 for each in own],
            "prefix": [each.prefix for each in own],
            "exact_match": [scores.exact_match(*each) for each in told],
            "f1": [scores.f1(*each) for each in told],
            "contains": [scores.contains(*each) for each in told],
            "new_not_found": [
                float(scores.says_not_found(one.text, phrases) and not scores.says_not_found(other.text, phrases))
                for one, other in zip(own, full, strict=True)
            ],
            "budget": [each.budget for each in own],
            "first_token_ms": [each.first_token_ms for each in own],
            "faster": [_faster(one, other) for one, other in zip(own, full, strict=True)],
        }

    def summed_up(self, seed: int, base: "_Values | None") -> ModeFidelity:
        def of(name: str, statistic: Statistic = mean) -> Estimate:
            return estimate(statistic, self.of[name], seed=seed)

        def judged(name: str) -> Estimate | None:
            return of(name) if self.of[name] else None

        against, recovered, worse = {}, None, None
        if base and base is not self:
            against = {
                name: estimate(mean_difference, self.of[name], base.of[name], seed=seed)
                for name in ("kl", "top1", "prefix", "exact_match", "f1", "contains", "new_not_found")
                if self.of[name]
            }
            more = [float(own > other) for own, other in zip(self.of["kl"], base.of["kl"], strict=True)]
            worse = estimate(mean, more, seed=seed)
            if any(base.of["kl"]):
                recovered = estimate(share_recovered, self.of["kl"], base.of["kl"], seed=seed)
        return ModeFidelity(
            mode=self.mode,
            kl=of("kl"),
            kl_p95=of("kl", p95),
            top1=of("top1"),
            prefix=of("prefix"),
            exact_match=judged("exact_match"),
            f1=judged("f1"),
            contains=judged("contains"),
            new_not_found=of("new_not_found"),
            budget=of("budget"),
            first_token_ms=of("first_token_ms", median),
            faster=of("faster", median),
            recovered=recovered,
            worse=worse,
            against=against,
        )


def _faster(own: Outcome, full: Outcome) -> float:
    return full.first_token_ms / max(own.first_token_ms, 1e-6)


def _listed(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}"


def _tenths(value: float, sign: str = "") -> str:
    return f"{value:{sign}.1f}"


def _percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} %"


def _cell(value: Estimate | None, form: Callable[..., str]) -> str:
    if value is None:
        return "-"
    if value.low == value.value == value.high:
        return form(value.value)
    return f"{form(value.value)} [{form(value.low).removesuffix(' %')}, {form(value.high).removesuffix(' %')}]"


_FIGURES: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("KL, nats", "kl", _number),
    ("KL, 95th percentile", "kl_p95", _number),
    ("same likeliest token", "top1", _percent),
    ("common start, tokens", "prefix", _tenths),
    ("exact match", "exact_match", _percent),
    ("F1", "f1", _percent),
    ("contains the reference", "contains", _percent),
    ('new "not in the documents"', "new_not_found", _percent),
    ("budget", "budget", _percent),
    ("first token, ms", "first_token_ms", _tenths),
    ("times faster", "faster", _tenths),
)
