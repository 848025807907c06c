"""What passes between the stages and out to the user: frozen data, no behaviour beyond reading it.

Knows nothing about tensors, models or files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

LEVEL_SYSTEM, LEVEL_CONTEXT, LEVEL_QUERY = 0, 1, 2
"""Levels of an entry: the system prompt, a context document, a turn of one conversation (never a registered chunk)."""

Mode = Literal["exact", "isolated", "anchored"]


@dataclass(frozen=True)
class Chunk:
    """A registered text. Immutable; its id is a hash of namespace, level and text, so it survives a change of model.

    Attributes:
        id: 32 hex digits.
        namespace: the namespace it lives in.
        level: 0 for a system prompt, 1 for context.
        text: the text, NFC-normalised and stripped of outer white space.
        name: the name it was asked for by, or its first name, or None.
        metadata: whatever the application attached; JSON types.
    """

    id: str
    namespace: str
    level: int
    text: str
    name: str | None = field(default=None, compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    _encode: Callable[[int, str], tuple[int, ...]] = field(default=lambda *_: (), repr=False, compare=False)

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """Its token ids under the open model, with the control tokens that it owns (see docs/concepts.md)."""
        return self._encode(self.level, self.text)

    @property
    def label(self) -> str:
        """Its name, or the start of its id: for people to read."""
        return self.name or self.id[:8]

    def __repr__(self) -> str:
        start = self.text[:40] + "…" if len(self.text) > 40 else self.text
        return f"Chunk(id={self.id!r}, name={self.name!r}, level={self.level}, text={start!r})"


@dataclass(frozen=True)
class Usage:
    """Where the tokens of one call came from. `prompt_tokens` = cached + computed + repaired.

    Attributes:
        prompt_tokens: tokens in the whole prompt: context and question.
        cached_tokens: taken from KV entries that were there before the call.
        computed_tokens: computed in this call: the question, and chunks whose entries were missing.
        repaired_tokens: context tokens computed again by the mode (none, in the modes of this version).
        completion_tokens: tokens generated, the closing control token included.
    """

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    repaired_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """How long one call took.

    Attributes:
        load_ms: reading entries from the store into memory.
        prefill_ms: computing missing entries and the question, to the first logits.
        first_token_ms: from the start of the call to the first token's id.
        decode_tokens_per_s: rate after the first token; None with fewer than two tokens.
    """

    load_ms: float
    prefill_ms: float
    first_token_ms: float
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: the generated text, control tokens removed; it ends before a stop string or stop id.
        token_ids: the generated ids, the closing control token included when there is one.
        prompt_ids: the ids of the whole prompt: what a full prefill would have been given.
        finish_reason: "stop" if the model, a stop string or a stop id ended it, "length" if it ran out of tokens.
        usage: where the prompt's tokens came from.
        timings: how long it took.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ExplainedChunk:
    """One chunk of a composition, as `Context.explain` sees it.

    Attributes:
        label: the chunk's name or the start of its id; "(header)" for the control tokens that no chunk owns.
        chunk_id: its id, None for the header.
        position: absolute position of its first token.
        tokens: how many tokens it holds.
        after: labels of the chunks that its entry is computed after.
        hit: whether its KV entry is there.
        where: "memory" or "store" on a hit, "nowhere" on a miss.
        reason: why it is a miss, or where the hit lies, in words.
        kv_bytes: size of its KV entry, padding to whole pages included.
    """

    label: str
    chunk_id: str | None
    position: int
    tokens: int
    after: tuple[str, ...]
    hit: bool
    where: Literal["memory", "store", "nowhere"]
    reason: str
    kv_bytes: int


@dataclass(frozen=True)
class Explanation:
    """What a call on this context would take from its caches and what it would compute. `str()` gives a table.

    Attributes:
        mode: the composition rule.
        chunks: one entry per chunk, in order.
        notes: what the mode did that its name does not say.
    """

    mode: str
    chunks: tuple[ExplainedChunk, ...]
    notes: tuple[str, ...]

    @property
    def cached_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks if chunk.hit)

    @property
    def missing_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks if not chunk.hit)

    def __str__(self) -> str:
        head = f"{self.mode}: {self.cached_tokens} tokens cached, {self.missing_tokens} to compute"
        rows = [
            f"  {chunk.position:>6} +{chunk.tokens:<6} {'hit ' if chunk.hit else 'miss'} {chunk.label}: {chunk.reason}"
            for chunk in self.chunks
        ]
        return "\n".join([head, *rows, *(f"  note: {note}" for note in self.notes)])
