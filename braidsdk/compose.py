"""The composition rule: chunks and a mode in, segments and positions out.

This is the one place that knows what a mode means. It touches no tensor and runs no model; models, kernels and the
store never see a mode.

Who owns which control token (the parts come from the model's chat template, see `tokens.PromptLayout`):

- A level-0 chunk that stands first owns the system block and the user header that follows it. It is the anchor.
- Without one, the bare user header is a segment of its own that belongs to no chunk.
- Every other chunk, level 0 or 1, is plain text closed with a newline and owns no control token.
- The tail owns the end of the user's turn and the assistant's header.
- A conversation's history stands between the chunks, which are part of its first user turn, and the tail. Each past
  turn is a segment: what was the tail of its call (the end of the turn before and the user header, the question, the
  assistant's header), and the answer. The end of the last turn and the user header open the new tail.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Protocol, get_args

from braidsdk.errors import UnknownModeError, WindowExceededError, did_you_mean, shown
from braidsdk.store.keys import EntryKey, ModelIdentity
from braidsdk.types import LEVEL_QUERY, LEVEL_SYSTEM, Chunk, Mode

DEFAULT_MODE: Mode = "anchored"


CHARACTERS_PER_TOKEN = 32
"""A text with more characters than this for each token of the window is refused untokenized; prose has 3 to 6."""


class Layout(Protocol):
    """The part of the prompt's layout that composing needs."""

    @property
    def header_ids(self) -> tuple[int, ...]: ...
    def plain_ids(self, text: str) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Segment:
    """A whole KV entry placed in a composition.

    Attributes:
        chunk: the chunk that owns it, None for the bare header and for a turn of the history.
        token_ids: its tokens.
        origin: absolute position of its token 0: key j of the entry sits at `origin + j`.
        after: indices of the segments of the same composition that its entry is computed after, in order.
            They stand contiguously from position 0 while it is computed, whatever their place here.
        keep: whether the entry goes to the store once computed.
        is_turn: whether it is a past turn of the conversation.
    """

    chunk: Chunk | None
    token_ids: tuple[int, ...]
    origin: int
    after: tuple[int, ...]
    keep: bool
    is_turn: bool = False

    @property
    def level(self) -> int:
        return LEVEL_QUERY if self.is_turn else self.chunk.level if self.chunk else LEVEL_SYSTEM

    @property
    def label(self) -> str:
        return self.chunk.label if self.chunk else "(turn)" if self.is_turn else "(header)"


@dataclass(frozen=True)
class Composition:
    """Ordered segments, and the tokens of one request that are still to compute.

    Attributes:
        mode: the rule that made it.
        segments: in the order of the prompt.
        notes: what the rule did that its name does not say.
        tail: token ids after the last segment; computed anew by every request.
    """

    mode: Mode
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()
    tail: tuple[int, ...] = ()

    @cached_property
    def tail_origin(self) -> int:
        """Absolute position of the tail's first token: the number of context tokens."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @cached_property
    def input_ids(self) -> tuple[int, ...]:
        """All token ids of the prompt, in order."""
        return (*chain.from_iterable(segment.token_ids for segment in self.segments), *self.tail)

    @property
    def tokens(self) -> int:
        """How many token ids the prompt has."""
        return self.tail_origin + len(self.tail)

    def with_tail(self, token_ids: Sequence[int]) -> "Composition":
        return replace(self, tail=tuple(token_ids))

    def with_turn(self, token_ids: Sequence[int]) -> "Composition":
        """This composition, and a past turn behind its segments.

        In every mode a turn is computed after all that precedes it, as its question and answer were. It is not stored.
        """
        everything = tuple(range(len(self.segments)))
        turn = Segment(None, tuple(token_ids), self.tail_origin, everything, keep=False, is_turn=True)
        return replace(self, segments=(*self.segments, turn))

    def keys(self, model: ModelIdentity, namespace: str, known: Sequence[EntryKey] = ()) -> tuple[EntryKey, ...]:
        """The key of each segment's KV entry, in order.

        Args:
            model, namespace: part of every key.
            known: keys of the first segments, where the caller has them.
        """
        keys = list(known)
        tokens = _Before(lambda key: key.token_bytes)
        # The mode decides which entries a turn has seen, so the same ids before it are not enough.
        entries = _Before(lambda key: (key.record_json + key.token_sha256).encode())
        for segment in self.segments[len(known) :]:
            before = [self.segments[i] for i in segment.after]
            seen = (entries if segment.is_turn else tokens).sha256(keys, segment.after)
            keys.append(
                EntryKey(
                    model=model,
                    namespace=namespace,
                    chunk_id=segment.chunk.id if segment.chunk else None,
                    level=segment.level,
                    token_ids=segment.token_ids,
                    after=tuple(other.chunk.id if other.chunk else None for other in before),
                    after_sha256=seen,
                )
            )
        return tuple(keys)


class _Before:
    """Hashes what segments are computed after; what it shares with the segment before is hashed once."""

    def __init__(self, content: Callable[[EntryKey], bytes]) -> None:
        self._content = content
        self._after: tuple[int, ...] = ()
        self._state = hashlib.sha256()

    def sha256(self, keys: Sequence[EntryKey], after: tuple[int, ...]) -> str:
        """SHA-256 of the joined contents of these keys, hex."""
        if after[: len(self._after)] != self._after:
            self._after, self._state = (), hashlib.sha256()
        for index in after[len(self._after) :]:
            self._state.update(self._content(keys[index]))
        self._after = after
        return self._state.hexdigest()


def parse_mode(mode: str | None) -> Mode:
    """The mode of that name; None is the default.

    Raises:
        UnknownModeError: there is no such mode.
    """
    if mode is None:
        return DEFAULT_MODE
    for known in get_args(Mode):
        if mode == known:
            return known  # type: ignore[no-any-return]  # get_args is untyped
    raise UnknownModeError(
        f"mode must be one of {', '.join(get_args(Mode))}; got {shown(mode)}.{did_you_mean(mode, get_args(Mode))}"
    )


def compose(
    chunks: Sequence[Chunk], *, layout: Layout, mode: str | None = None, keep: bool | None = None
) -> Composition:
    """Place `chunks` one after another.

    Args:
        chunks: in the order of the prompt; the same chunk may stand in it twice.
        layout: the open model's prompt layout.
        mode: "exact" computes each chunk after all that precede it; "anchored" after the anchor alone; "isolated"
            alone. None is "anchored".
        keep: whether computed entries go to the store. None keeps all but the chains of `exact`, which only this
            very order of chunks can use again.

    Raises:
        UnknownModeError: there is no such mode.
    """
    rule = parse_mode(mode)
    anchor = chunks[0] if chunks and chunks[0].level == LEVEL_SYSTEM else None
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
        segments.append(Segment(chunk, token_ids, origin, after, keep_it))
        origin += len(token_ids)
    return Composition(rule, tuple(segments), _notes(rule, chunks, anchor))


def _notes(rule: Mode, chunks: Sequence[Chunk], anchor: Chunk | None) -> tuple[str, ...]:
    notes = []
    if rule == "anchored" and not anchor:
        notes.append("there is no anchor (no level-0 chunk stands first), so every chunk is isolated")
    plain = [chunk.label for chunk in (chunks[1:] if anchor else chunks) if chunk.level == LEVEL_SYSTEM]
    if plain:
        notes.append(f"a level-0 chunk that does not stand first is a plain chunk: {', '.join(plain)}")
    return tuple(notes)


def check_length(text: str, window: int, what: str, remedy: str) -> None:
    """Raise `WindowExceededError` for a text so long that it is not worth normalising and tokenizing, which takes a
    second and 150 MB for a megabyte."""
    limit = window * CHARACTERS_PER_TOKEN
    if len(text) > limit:
        raise WindowExceededError(
            f"{what} must have at most {limit:,} characters, {CHARACTERS_PER_TOKEN} for each token of the model's "
            f"window; got {len(text):,}. {remedy}"
        )


def check_window(tokens: int, window: int, what: str, remedy: str) -> None:
    """Raise `WindowExceededError` unless `tokens` fit in the model's window with room for one more."""
    if tokens >= window:
        raise WindowExceededError(
            f"{what} takes {tokens:,} tokens; the model's window holds {window:,}, the answer included. {remedy}"
        )
