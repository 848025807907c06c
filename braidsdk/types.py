"""What passes between the stages and out to the user: frozen data, no behaviour beyond reading it.

Knows nothing about tensors, models or files.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

from braidsdk.errors import BraidError

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

    def __getstate__(self) -> dict[str, Any]:
        """All but the tokenizer: a copy in another process keeps the token ids that it has here."""
        state = {**self.__dict__, "token_ids": self.token_ids}
        del state["_encode"]
        return state

    def __repr__(self) -> str:
        start = self.text[:40] + "…" if len(self.text) > 40 else self.text
        return f"Chunk(id={self.id!r}, name={self.name!r}, level={self.level}, text={start!r})"


class PageDocument(Protocol):
    """A text as LangChain's retrievers give it: its `Document`."""

    @property
    def page_content(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class TextNode(Protocol):
    """A text as LlamaIndex's retrievers give it: its `TextNode`, `Document` and `NodeWithScore`."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


Text = str | PageDocument | TextNode
"""What can be registered."""


@dataclass(frozen=True)
class Skipped:
    """A text that `register_many(on_error="skip")` left out.

    Attributes:
        index: its place among the texts given.
        name: the name it was given, or None.
        error: what `on_error="raise"` would have raised.
    """

    index: int
    name: str | None
    error: BraidError

    def __str__(self) -> str:
        return f"text {self.index}{f' ({self.name})' if self.name else ''}: {self.error}"


class Registered(list[Chunk]):
    """What `register_many` returns: the chunks, in the order of their texts.

    Attributes:
        skipped: the texts that were left out; always empty without `on_error="skip"`.
    """

    def __init__(self, chunks: Iterable[Chunk] = (), skipped: Iterable[Skipped] = ()) -> None:
        super().__init__(chunks)
        self.skipped = tuple(skipped)


@dataclass(frozen=True)
class Progress:
    """How far a registration is.

    Attributes:
        done_tokens: tokens computed and stored so far.
        total_tokens: tokens that were missing at the start.
        done_chunks, total_chunks: the same in chunks.
        tokens_per_s: rate since the start; None before the first batch.
        seconds_left: at that rate; None before the first batch.
    """

    done_tokens: int
    total_tokens: int
    done_chunks: int
    total_chunks: int
    tokens_per_s: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class RegistrationEstimate:
    """What registering texts would take, before any of it is done. `str()` gives one short paragraph.

    Attributes:
        chunks: texts that can be registered, the same text counted once.
        tokens: their tokens.
        tokens_to_compute: tokens whose KV entries are not there yet, a missing anchor's included.
        bytes_to_write: size of the files that these make in the store.
        free_disk_bytes: free space where the store lies.
        seconds: expected time, at the rate that this model had on this device so far; None if that is not known.
        deferred_tokens: tokens that wait for the first question, because no anchor was given.
    """

    chunks: int
    tokens: int
    tokens_to_compute: int
    bytes_to_write: int
    free_disk_bytes: int
    seconds: float | None
    deferred_tokens: int = 0

    @property
    def fits(self) -> bool:
        """Whether the store's disk has room for it, with `MARGIN_BYTES` to spare."""
        return not self.bytes_to_write or self.bytes_to_write + MARGIN_BYTES <= self.free_disk_bytes

    def __str__(self) -> str:
        time = "an unknown time" if self.seconds is None else f"about {duration(self.seconds)}"
        text = f"{_counted(self.chunks, 'chunk')} of {_counted(self.tokens, 'token')}"
        if self.tokens_to_compute:
            text += f"; {self.tokens_to_compute:,} to compute in {time}"
        else:
            text += "; nothing to compute now"
        text += f"; {size(self.bytes_to_write)} to write, {size(self.free_disk_bytes)} free on the disk"
        if self.deferred_tokens:
            text += f"; without an anchor {self.deferred_tokens:,} tokens wait for the first question"
        return f"{text}."


MARGIN_BYTES = 64 * 2**20
"""What a registration leaves free on the store's disk."""


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
        load_ms: from its admission until every entry that it needs was read from the store, or was its own to compute.
        prefill_ms: computing missing entries and the question, to the first logits.
        first_token_ms: from the start of the call to the first token's id, time in the queue included.
        decode_tokens_per_s: rate after the first token; None with fewer than two tokens.
        compute_ms: the part of `prefill_ms` that went into computing missing entries. They are written meanwhile.
    """

    load_ms: float
    prefill_ms: float
    first_token_ms: float
    decode_tokens_per_s: float | None
    compute_ms: float = 0.0


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
        expected_ms: how long having it ready should take: nothing in memory, else reading or computing it at the rates
            measured so far; None where no rate is known.
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
    expected_ms: float | None = None


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
    def hits(self) -> int:
        """Chunks whose KV entry is there."""
        return sum(chunk.hit for chunk in self.chunks)

    @property
    def misses(self) -> int:
        """Chunks whose KV entry has to be computed."""
        return len(self.chunks) - self.hits

    @property
    def cached_tokens(self) -> int:
        """Tokens of the hits."""
        return sum(chunk.tokens for chunk in self.chunks if chunk.hit)

    @property
    def missing_tokens(self) -> int:
        """Tokens of the misses."""
        return sum(chunk.tokens for chunk in self.chunks if not chunk.hit)

    @property
    def kv_bytes(self) -> int:
        """Size of all KV entries together."""
        return sum(chunk.kv_bytes for chunk in self.chunks)

    @property
    def expected_load_ms(self) -> float | None:
        """Reading what lies in the store; None where no rate is known."""
        return self._expected("store")

    @property
    def expected_compute_ms(self) -> float | None:
        """Computing what is missing; None where no rate is known."""
        return self._expected("nowhere")

    @property
    def expected_ms(self) -> float | None:
        """Having the whole context ready, before the question itself is computed; None where no rate is known."""
        load, compute = self.expected_load_ms, self.expected_compute_ms
        return None if load is None or compute is None else load + compute

    def _expected(self, where: str) -> float | None:
        times = [chunk.expected_ms for chunk in self.chunks if chunk.where == where]
        return None if None in times else sum(time for time in times if time is not None)

    def beside(self, answer: "Answer") -> str:
        """A table of what was expected and what the call then took, for people.

        Args:
            answer: of a call on the same context, right after it was explained.
        """
        usage, timings = answer.usage, answer.timings
        question = usage.prompt_tokens - self.cached_tokens - self.missing_tokens
        rows = [
            ("", "expected", "real"),
            ("cached tokens", f"{self.cached_tokens:,}", f"{usage.cached_tokens:,}"),
            ("computed tokens", f"{self.missing_tokens + question:,}", f"{usage.computed_tokens:,}"),
            ("load", milliseconds(self.expected_load_ms), milliseconds(timings.load_ms)),
            ("compute missing", milliseconds(self.expected_compute_ms), milliseconds(timings.compute_ms)),
            ("compute question", "", milliseconds(timings.prefill_ms - timings.compute_ms)),
            ("first token", "", milliseconds(timings.first_token_ms)),
        ]
        return "\n".join(f"  {name:<16} {expected:>10} {real:>10}".rstrip() for name, expected, real in rows)

    def __str__(self) -> str:
        head = f"{self.mode}: {self.cached_tokens} tokens cached, {self.missing_tokens} to compute"
        if self.expected_ms is not None:
            head = f"{self.mode}: {milliseconds(self.expected_ms)} expected; " + head.partition(": ")[2]
        rows = [
            f"  {chunk.position:>6} +{chunk.tokens:<6} {size(chunk.kv_bytes):>8} {milliseconds(chunk.expected_ms):>9} "
            f"{'hit ' if chunk.hit else 'miss'} {chunk.label}: {chunk.reason}"
            for chunk in self.chunks
        ]
        return "\n".join([head, *rows, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class EntryGroup:
    """The stored KV entries of one model, dtype and level.

    Attributes:
        model: the name that the model was opened by last, or the start of its weights' fingerprint.
        dtype: what they were computed in.
        level: 0 system, 1 context.
        entries: how many.
        bytes: their KV on disk, padding included.
    """

    model: str
    dtype: str
    level: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class Stats:
    """What a store holds and how it served. `str()` gives a few lines.

    A hit is an entry that a call found, in memory or store; a miss is one that it had to compute. Registering counts
    as neither.

    Attributes:
        chunks: registered chunks, of all namespaces.
        entries: stored KV entries.
        bytes: their KV on disk.
        damaged: files set aside so far.
        groups: entries by model, dtype and level.
        hits, misses: since this Braid was opened.
        all_hits, all_misses: of every process that used this store and closed it, and of this one.
        pool_used_bytes: KV memory of resident entries and running calls.
        pool_capacity_bytes: KV memory that the pool has.
        running: requests that are admitted and have not ended: loading, computing, decoding, or writing.
        waiting: requests that wait for memory or a place.
        steps: passes of the engine since this Braid was opened.
        step_tokens: tokens that all of them computed, prefilled or decoded.
        last_step_rows: answers that got a token in the last one.
    """

    chunks: int
    entries: int
    bytes: int
    damaged: int
    groups: tuple[EntryGroup, ...]
    hits: int
    misses: int
    all_hits: int
    all_misses: int
    pool_used_bytes: int
    pool_capacity_bytes: int
    running: int = 0
    waiting: int = 0
    steps: int = 0
    step_tokens: int = 0
    last_step_rows: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step computed, on average."""
        return self.step_tokens / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        damaged = f", {_counted(self.damaged, 'damaged file')} set aside" if self.damaged else ""
        rows = [
            f"  {group.model} {group.dtype}, level {group.level}: {group.entries:,} of {size(group.bytes)}"
            for group in self.groups
        ]
        return "\n".join(
            [
                f"{_counted(self.chunks, 'chunk')}, {self.entries:,} stored KV entries of {size(self.bytes)}{damaged}",
                *rows,
                f"{_counted(self.hits, 'hit')} and {_counted(self.misses, 'miss', 'misses')} since it was opened; "
                f"{self.all_hits:,} and {self.all_misses:,} in all",
                f"{size(self.pool_used_bytes)} of {size(self.pool_capacity_bytes)} KV memory used",
            ]
        )


def size(count: int) -> str:
    """Bytes for people: "1.2 GB", decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} GB"


def milliseconds(time: float | None) -> str:
    """A time for people: "3.2 ms"; "-" for one that is not known."""
    if time is None:
        return "-"
    return f"{time:.1f} ms" if time < 100 else f"{time:,.0f} ms"


def duration(seconds: float) -> str:
    """A time for people: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
