"""A composition: segments at their places, and the key of the KV entry of each.

This module touches no tensor and runs no model. Models, kernels and the store never see a mode.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from braidsdk.prompt.lru import LRU, nbytes_of
from braidsdk.store.keys import EntryKey, ModelIdentity
from braidsdk.types import LEVEL_CONTEXT, LEVEL_QUERY, LEVEL_SYSTEM, Chunk

if TYPE_CHECKING:
    from braidsdk.compose.repairs import Repair

KEY_BYTES, AFTER_BYTES = 2_000, 120
"""What a remembered key takes beside its token ids: its record and hashes, and an id for each chunk before it."""


@dataclass(frozen=True)
class Segment:
    """A whole KV entry placed in a composition.

    Attributes:
        chunk: the chunk that owns it, which has no id if it is not registered; None for the bare header and for a turn
            of the history.
        token_ids: its tokens.
        origin: absolute position of its token 0. Key j of the entry is at `origin + j`.
        after: indices of the segments of the same composition that its entry is computed after, in order.
            While it is computed they stand contiguously from position 0, whatever their place here.
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
    def chunk_id(self) -> str | None:
        """The id of its registered chunk; None if it belongs to none."""
        return self.chunk.id or None if self.chunk else None

    @property
    def is_inline(self) -> bool:
        """Whether it is a text that is not registered."""
        return self.chunk is not None and not self.chunk.id

    @property
    def label(self) -> str:
        return self.chunk.label if self.chunk else "(turn)" if self.is_turn else "(header)"


@dataclass(frozen=True)
class Composition:
    """Ordered segments, and the tokens of one request that are still to compute.

    Attributes:
        mode: the rule that made it, as text.
        segments: in the order of the prompt.
        notes: what the rule did that its name does not say.
        tail: token ids after the last segment; every request computes them again.
        repair: which tokens of the segments are computed again for a request, None for none.
        keeps_overlay: whether what is computed again goes to the store, and is taken from there.
    """

    mode: str
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()
    tail: tuple[int, ...] = ()
    repair: "Repair | None" = None
    keeps_overlay: bool = False

    @cached_property
    def tail_origin(self) -> int:
        """Absolute position of the tail's first token: the number of context tokens."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @cached_property
    def exact_segments(self) -> int:
        """How many of its first segments have seen all that stands before them, so that they are as in a full
        prefill."""
        places = enumerate(self.segments)
        return next((at for at, each in places if each.after != tuple(range(at))), len(self.segments))

    @cached_property
    def input_ids(self) -> tuple[int, ...]:
        """All token ids of the prompt, in order."""
        return (*chain.from_iterable(segment.token_ids for segment in self.segments), *self.tail)

    @property
    def tokens(self) -> int:
        """How many token ids the prompt has."""
        return self.tail_origin + len(self.tail)

    @property
    def chunks(self) -> int:
        """How many context chunks it has."""
        return sum(segment.level == LEVEL_CONTEXT for segment in self.segments)

    @property
    def anchored(self) -> bool:
        """Whether a system prompt stands first."""
        return bool(self.segments) and self.segments[0].chunk is not None and self.segments[0].level == LEVEL_SYSTEM

    def with_tail(self, token_ids: Sequence[int]) -> "Composition":
        return replace(self, tail=tuple(token_ids))

    def with_turn(self, token_ids: Sequence[int]) -> "Composition":
        """This composition with a past turn after its segments.

        In every mode a turn is computed after everything before it, as its question and answer were. It is not stored.
        """
        everything = tuple(range(len(self.segments)))
        turn = Segment(None, tuple(token_ids), self.tail_origin, everything, keep=False, is_turn=True)
        return replace(self, segments=(*self.segments, turn))

    def keys(
        self,
        model: ModelIdentity,
        namespace: str,
        known: Sequence[EntryKey] = (),
        recent: LRU[tuple[object, ...], EntryKey] | None = None,
    ) -> tuple[EntryKey, ...]:
        """The key of each segment's KV entry, in order.

        Args:
            model, namespace: part of every key.
            known: keys of the first segments, if the caller has them.
            recent: keys of chunks made lately for this model and namespace, each with its hashes; kept up to date.
        """
        keys = list(known)
        tokens = _Before(lambda key: key.token_bytes)
        # The mode decides which entries a turn has seen, so the same ids before it are not enough.
        entries = _Before(lambda key: (key.record_json + key.token_sha256).encode())
        for segment in self.segments[len(known) :]:
            before = [self.segments[i] for i in segment.after]
            seen = (entries if segment.is_turn else tokens).sha256(keys, segment.after)
            chunk_id = segment.chunk_id
            after = tuple(other.chunk_id for other in before)
            name = (chunk_id, segment.level, segment.token_ids, after, seen)
            key = recent.get(name) if recent else None
            if key is None:
                key = EntryKey(model, namespace, *name)
                if recent and chunk_id:
                    recent.put(name, key, nbytes_of("", segment.token_ids) + KEY_BYTES + AFTER_BYTES * len(after))
            keys.append(key)
        return tuple(keys)


class _Before:
    """Hashes what segments are computed after. What a segment shares with the one before it is hashed once."""

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
