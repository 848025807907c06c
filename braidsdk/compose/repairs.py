"""Repairs: which tokens of a composition are computed again, with sight of everything before them. Touches no tensor.

A rule is data. `linked` and `random` follow from the composition alone; the others rank tokens by what the model says
of them, and the engine asks it.
"""

import hashlib
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import xxhash

from braidsdk.compose.composition import Composition
from braidsdk.errors import InputError, shown
from braidsdk.store.keys import EntryKey, canonical_json
from braidsdk.types import LEVEL_OVERLAY

SHIFT = "+shift"
"""Behind a rule: the tokens of a chunk that are not chosen move as the chosen ones do in the mean, in their keys and in
their values, by the share m / (m + SHRINKING) if m are chosen."""

SHRINKING = 16

MOST_K = 1 << 20
"""`linked(k)` takes no more: longer than any window."""

MOST_NEAR = 64
"""Nor does `near` of `guided`: longer than most sentences."""


@dataclass(frozen=True)
class Linked:
    """The first `k` tokens of every chunk (LegoLink, Hu et al. 2024, arXiv:2410.15332).

    Attributes:
        k: how many.
        shift: see `SHIFT`.
    """

    k: int = 16
    shift: bool = False
    name: ClassVar[str] = "linked"

    def __str__(self) -> str:
        return f"{self.name}({self.k}){SHIFT * self.shift}"


@dataclass(frozen=True)
class Guided:
    """The tokens that the question attends to most (as ProphetKV, arXiv:2602.02579, ranks them).

    Attributes:
        ratio: how many, as a share of the chunks' tokens.
        layers: indices of the layers whose attention counts. Empty for those from 54 to 88 % of the model's depth.
        near: an attended token also counts for those at most so many tokens away in the same chunk, at a distance d
            times 1 - d / (near + 1); the greatest counts. At most `MOST_NEAR`; None for 0.
        shift: see `SHIFT`.

    Without `layers` and `near` both are what `Braid.fidelity(calibrate=True)` found for the model, if it did.
    """

    ratio: float = 0.15
    layers: tuple[int, ...] = ()
    near: int | None = None
    shift: bool = False
    name: ClassVar[str] = "guided"

    def __str__(self) -> str:
        layers = f", layers={'/'.join(map(str, self.layers))}" if self.layers else ""
        near = "" if self.near is None else f", near={self.near}"
        return f"{self.name}({self.ratio:g}{layers}{near}){SHIFT * self.shift}"

    def calibrated(self, found: "Guided | None") -> "Guided":
        """This rule with the layers and the distance that were found for a model, unless it names its own."""
        if found is None or self.layers or self.near is not None:
            return self
        return replace(self, layers=found.layers, near=found.near)


@dataclass(frozen=True)
class Blended:
    """The tokens whose keys at an early layer change most (CacheBlend, Yao et al. 2024, arXiv:2405.16444).

    Attributes:
        ratio: how many, as a share of the chunks' tokens.
        layer: index of the layer.
        shift: see `SHIFT`.
    """

    ratio: float = 0.2
    layer: int = 1
    shift: bool = False
    name: ClassVar[str] = "blended"

    def __str__(self) -> str:
        return f"{self.name}({self.ratio:g}{'' if self.layer == 1 else f', layer={self.layer}'}){SHIFT * self.shift}"


@dataclass(frozen=True)
class Random:
    """Any tokens: the control for measurements, which a rule that chooses must beat. The same prompt gets the same
    tokens, another question others.

    Attributes:
        ratio: how many, as a share of the chunks' tokens.
        shift: see `SHIFT`.
    """

    ratio: float = 0.15
    shift: bool = False
    name: ClassVar[str] = "random"

    def __str__(self) -> str:
        return f"{self.name}({self.ratio:g}){SHIFT * self.shift}"


Repair = Linked | Guided | Blended | Random

RULES: dict[str, type[Repair]] = {rule.name: rule for rule in (Linked, Guided, Blended, Random)}

_TEXT = re.compile(r"(\w+)(?:\((.*)\))?", re.ASCII)


def parse_repair(mode: str) -> Repair | None:
    """The rule that a text such as "guided(0.15)+shift" or "blended(0.2, layer=2)" stands for; None if it names none.
    Without parentheses the rule has its defaults.

    Raises:
        InputError: an argument is missing, unknown or out of range.
    """
    text = mode.strip()
    shift = text.endswith(SHIFT)
    found = _TEXT.fullmatch(text.removesuffix(SHIFT).strip())
    rule = RULES.get(found[1]) if found else None
    if found is None or rule is None:
        return None
    names = [field.name for field in fields(rule) if field.name != "shift"]
    given: dict[str, float | tuple[int, ...]] = {}
    for place, argument in enumerate(found[2].split(",") if found[2] is not None else ()):
        name, equals, value = (part.strip() for part in argument.rpartition("="))
        name = name if equals else names[place] if place < len(names) else ""
        if name not in names or name in given:
            raise InputError(f"mode {rule.name!r} must have {_form(rule)}; got {shown(mode)}.")
        given[name] = _layers(rule, value, mode) if name == "layers" else _number(rule, name, value, mode)
    if found[2] is not None and names[0] not in given:
        raise InputError(f"mode {rule.name!r} must have {_form(rule)}; got {shown(mode)}.")
    return rule(**given, shift=shift)  # type: ignore[arg-type]  # each field has the type that it asks for


def _layers(rule: type[Repair], value: str, mode: str) -> tuple[int, ...]:
    try:
        layers = tuple(sorted({int(each) for each in value.split("/")}))
    except ValueError:
        layers = (-1,)
    if layers[0] < 0:
        raise InputError(
            f"layers of mode {rule.name!r} must be indices with slashes between them, such as 19/20/22; got "
            f"{shown(mode)}."
        )
    return layers


def _number(rule: type[Repair], name: str, value: str, mode: str) -> float:
    try:
        number = float(value) if name == "ratio" else int(value)
    except ValueError:
        number = math.nan
    if name == "ratio" and not 0 <= number <= 1:
        raise InputError(f"ratio of mode {rule.name!r} must be from 0 to 1; got {shown(mode)}.")
    most = MOST_NEAR if name == "near" else MOST_K
    if name != "ratio" and not 0 <= number <= most:
        raise InputError(f"{name} of mode {rule.name!r} must be a whole number from 0 to {most:,}; got {shown(mode)}.")
    return number


def _form(rule: type[Repair]) -> str:
    return {
        "linked": "the form linked(k), with a whole number of tokens",
        "guided": "the form guided(ratio), perhaps with layers=19/20/22 and near=12, with a ratio from 0 to 1",
        "random": "the form random(ratio), with a ratio from 0 to 1",
        "blended": "the form blended(ratio) or blended(ratio, layer=1), with a ratio from 0 to 1",
    }[rule.name]


def check_layers(repair: Repair | None, layers: int) -> None:
    """Check that a model of so many layers has the one that a rule looks at.

    Raises:
        InputError: it has not.
    """
    match repair:
        case Blended(layer=layer) if layer >= layers:
            what, hint = "layer", "Take an early layer, such as 1."
        case Guided(layers=several) if several and (layer := max(several)) >= layers:
            what, hint = "layers", "Leave them out, or calibrate them."
        case _:
            return
    raise InputError(
        f"{what} of mode {str(repair)!r} must be below {layers}, the number of the model's layers; got {layer}. {hint}"
    )


def repairable(composition: Composition) -> list[int]:
    """Indices of the segments that a rule may choose tokens of: chunks whose entry was not computed after exactly what
    precedes them here. Past turns of a conversation are left as they are."""
    return [
        index
        for index, segment in enumerate(composition.segments)
        if index and not segment.is_turn and segment.after != tuple(range(index))
    ]


def most_tokens(composition: Composition) -> int:
    """How many tokens the composition's rule chooses at most."""
    if composition.repair is None:
        return 0
    sizes = [len(composition.segments[index].token_ids) for index in repairable(composition)]
    match composition.repair:
        case Linked(k):
            return sum(min(k, size) for size in sizes)
        case Guided(ratio) | Blended(ratio) | Random(ratio):
            chunks = sum(len(segment.token_ids) for segment in composition.segments[1:] if not segment.is_turn)
            return min(math.ceil(ratio * chunks), sum(sizes))


def overlay_tokens(composition: Composition) -> int:
    """Tokens that a request takes memory for: those that the rule chooses, and a shift for each segment."""
    shifts = len(repairable(composition)) if composition.repair and composition.repair.shift else 0
    most = most_tokens(composition)
    return most and most + shifts


def first_tokens(composition: Composition, k: int) -> list[int]:
    """Absolute positions of the first `k` tokens of each repairable segment, in order."""
    segments = [composition.segments[index] for index in repairable(composition)]
    return [segment.origin + offset for segment in segments for offset in range(min(k, len(segment.token_ids)))]


def random_tokens(composition: Composition) -> list[int]:
    """Absolute positions of as many tokens as the rule chooses, by a hash of the tail's tokens and the position."""
    tail = array("q", composition.tail).tobytes()
    segments = [composition.segments[index] for index in repairable(composition)]
    places = [range(segment.origin, segment.origin + len(segment.token_ids)) for segment in segments]
    return ranked(composition, [[xxhash.xxh3_64_intdigest(tail, at) for at in place] for place in places])


def ranked(composition: Composition, scores: Sequence[Sequence[float]]) -> list[int]:
    """Absolute positions of the tokens with the highest scores, as many as the rule chooses, in order of position. Of
    equal scores the lower position goes first.

    Args:
        composition: it has a rule.
        scores: of each repairable segment's tokens.
    """
    segments = [composition.segments[index] for index in repairable(composition)]
    tokens = [
        (-score, segment.origin + offset)
        for segment, values in zip(segments, scores, strict=True)
        for offset, score in enumerate(values)
    ]
    return sorted(position for _, position in sorted(tokens)[: most_tokens(composition)])


def overlay_key(composition: Composition, keys: Sequence[EntryKey], positions: Sequence[int]) -> EntryKey:
    """The key of what the composition's rule computes again. It follows from the entries and the positions alone: past
    turns and the question stand behind all of them, so nothing of it has seen these.

    Args:
        composition: it has a rule.
        keys: of its segments' entries.
        positions: absolute positions of the chosen tokens, ascending, at least one.
    """
    segments = [segment for segment in composition.segments if not segment.is_turn]
    entries = [(key.record_json, key.token_sha256) for key in keys[: len(segments)]]
    seen = canonical_json([composition.mode, list(positions), entries])
    chosen, ids = list(positions), composition.input_ids
    if composition.repair and composition.repair.shift:  # in the place of each shift, its segment's first token
        spans = [range(segment.origin, segment.origin + len(segment.token_ids)) for segment in segments]
        chosen += [span.start for span in spans if not set(span).isdisjoint(positions)]
    return EntryKey(
        keys[0].model,
        keys[0].namespace,
        None,
        LEVEL_OVERLAY,
        tuple(ids[at] for at in chosen),
        tuple(segment.chunk_id for segment in segments),
        hashlib.sha256(seen.encode()).hexdigest(),
    )
