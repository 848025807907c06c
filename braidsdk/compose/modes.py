"""The composition rule: chunks and a mode in, segments and positions out.

This is the one place that knows what a mode means.

Who owns which control token (the parts come from the model's chat template, see `prompt.layout.PromptLayout`):

- A level-0 chunk that stands first owns the system block and the user header that follows it. It is the anchor.
- Without one, the bare user header is a segment of its own that belongs to no chunk.
- Every other chunk, level 0 or 1, is plain text closed with a newline and owns no control token.
- The tail owns the end of the user's turn and the assistant's header.
- A conversation's history stands between the chunks, which are part of its first user turn, and the tail. Each past
  turn is a segment: what was the tail of its call (the end of the turn before and the user header, the question, the
  assistant's header), and the answer. The end of the last turn and the user header open the new tail.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, get_args

from braidsdk.compose.auto import Auto, choose, parse_auto
from braidsdk.compose.composition import Composition, Segment
from braidsdk.compose.repairs import RULES, Guided, Repair, most_tokens, parse_repair
from braidsdk.errors import InputError, UnknownModeError, did_you_mean, shown
from braidsdk.types import LEVEL_CONTEXT, LEVEL_SYSTEM, Certificate, Chunk, Mode


class Layout(Protocol):
    """The part of the prompt's layout that composing needs."""

    @property
    def header_ids(self) -> tuple[int, ...]: ...
    def plain_ids(self, text: str) -> tuple[int, ...]: ...


def parse_mode(mode: "str | Repair | Auto") -> tuple[Mode, Repair | None] | Auto:
    """What a mode means: how chunks are computed, and which of their tokens are then computed again; or `Auto`, which
    certificates decide.

    Raises:
        UnknownModeError: there is no such mode.
        InputError: an argument of the mode is missing, unknown or out of range.
    """
    if isinstance(mode, Repair | Auto):
        try:
            text = str(mode)
        except (TypeError, ValueError) as error:
            raise InputError(f"mode {mode.name!r} must have numbers as its arguments; got {shown(mode)}.") from error
        return parse_mode(text)
    for known in get_args(Mode):
        if mode == known:
            return known, None
    if isinstance(mode, str):
        if repair := parse_repair(mode):
            return "anchored", repair
        if auto := parse_auto(mode):
            return auto
    names = [Auto.name, *get_args(Mode), *map(str, (rule() for rule in RULES.values()))]
    near = did_you_mean(str(mode).partition("(")[0], [Auto.name, *get_args(Mode), *RULES])
    raise UnknownModeError(f"mode must be one of {', '.join(names)}; got {shown(mode)}.{near}")


def compose(
    chunks: Sequence[Chunk],
    *,
    layout: Layout,
    mode: "str | Repair | Auto" = "anchored",
    keep: bool | None = None,
    certificates: Sequence[Certificate] = (),
    calibrated: Guided | None = None,
) -> Composition:
    """Place `chunks` one after another.

    Args:
        chunks: in the order of the prompt; the same chunk may stand in it twice.
        layout: the open model's prompt layout.
        mode: "exact" computes each chunk after all chunks before it, "anchored" after the anchor only, "isolated" on
            its own. "linked(k)", "guided(ratio)" and "blended(ratio, layer=1)" take what "anchored" has, and compute
            some of its tokens again for each request; see `repairs`. "auto" is one of these; see `auto`.
        keep: whether computed entries go to the store. None keeps all of them except the chains of `exact`, which only
            the same order of chunks can use again, and what repairs compute, which needs the same tokens besides.
        certificates: what `auto` chooses by.
        calibrated: what was found for the model; `guided` takes layers and distance of it if the mode names neither.

    Raises:
        UnknownModeError: there is no such mode.
        InputError: an argument of the mode is missing, unknown or out of range.
    """
    if keep and not all(chunk.id for chunk in chunks):
        raise InputError(
            "keep must not be True with an Inline text that is not registered. Register it, or leave keep out."
        )
    anchor = chunks[0] if chunks and chunks[0].level == LEVEL_SYSTEM else None
    notes: tuple[str, ...] = ()
    parsed = parse_mode(mode)
    if isinstance(parsed, Auto):
        count = sum(chunk.level == LEVEL_CONTEXT for chunk in chunks)
        chosen, why = choose(parsed, certificates, count, anchor=anchor is not None)
        notes, parsed = (why,), parse_mode(chosen)
        calibrated = None  # a certificate names what was measured
        assert not isinstance(parsed, Auto)
    rule, repair = parsed
    if isinstance(repair, Guided):
        repair = repair.calibrated(calibrated)
    pieces: list[tuple[Chunk | None, tuple[int, ...]]]
    pieces = [(anchor, anchor.token_ids)] if anchor else [(None, layout.header_ids)]
    pieces += [
        (chunk, layout.plain_ids(chunk.text) if chunk.level == LEVEL_SYSTEM else chunk.token_ids)
        for chunk in chunks[1 if anchor else 0 :]
    ]

    segments: list[Segment] = []
    origin = 0
    for index, (chunk, token_ids) in enumerate(pieces):
        if rule == "exact":
            after = tuple(range(index))
        elif rule == "anchored" and anchor and index:
            after = (0,)
        else:
            after = ()
        keep_it = keep if keep is not None else (rule != "exact" or index == 0)
        segment = Segment(chunk, token_ids, origin, after, keep_it)
        if any(each.is_inline for each in (segment, *(segments[place] for place in after))):
            segment = replace(segment, keep=False)
        segments.append(segment)
        origin += len(token_ids)
    notes += _notes(rule, chunks, anchor)
    keeps = bool(repair and keep)
    composition = Composition(str(repair or rule), tuple(segments), notes, repair=repair, keeps_overlay=keeps)
    if tokens := most_tokens(composition):
        note = f"up to {tokens:,} of {origin:,} tokens are computed again for each question"
        note += ", or taken from an earlier one if they are the same" if keeps else ""
        composition = replace(composition, notes=(*composition.notes, note))
    return composition


def _notes(rule: Mode, chunks: Sequence[Chunk], anchor: Chunk | None) -> tuple[str, ...]:
    notes = []
    if rule == "anchored" and not anchor:
        notes.append("there is no anchor (no level-0 chunk stands first), so every chunk is isolated")
    plain = [chunk.label for chunk in (chunks[1:] if anchor else chunks) if chunk.level == LEVEL_SYSTEM]
    if plain:
        notes.append(f"a level-0 chunk that does not stand first is a plain chunk: {', '.join(plain)}")
    return tuple(notes)
