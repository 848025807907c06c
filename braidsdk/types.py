"""Data that passes between the stages and out to the user. It is frozen, and has no behaviour beyond reading it.

Knows nothing about tensors, models or files.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, Protocol

from braidsdk.errors import BraidError, InputError
from braidsdk.plots import heat_map

LEVEL_SYSTEM, LEVEL_CONTEXT, LEVEL_QUERY, LEVEL_OVERLAY = 0, 1, 2, 3
"""The levels of an entry: a system prompt, a context document, a turn of a conversation, or an overlay: what a mode has
computed again of a composition. The last two are never registered chunks."""

Mode = Literal["exact", "isolated", "anchored"]


@dataclass(frozen=True)
class Chunk:
    """A registered text. Immutable; its id is a hash of namespace, level and text, so it survives a change of model.

    Attributes:
        id: 32 hex digits; "" for an `Inline` text, which is not registered.
        namespace: the namespace that it belongs to.
        level: 0 for a system prompt, 1 for context.
        text: the text, NFC-normalised and stripped of outer white space.
        name: the name that it was asked for by, else its first name, else None.
        metadata: what the application attached, as JSON types.
        pinned: whether its KV entries stay when others are evicted.
    """

    id: str
    namespace: str
    level: int
    text: str
    name: str | None = field(default=None, compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    _encode: Callable[[int, str], tuple[int, ...]] = field(default=lambda *_: (), repr=False, compare=False)
    pinned: bool = field(default=False, compare=False)

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """Its token ids under the open model, including the control tokens that it owns (see docs/concepts.md)."""
        return self._encode(self.level, self.text)

    @property
    def label(self) -> str:
        """Its name, or the start of its id, for people to read."""
        return self.name or self.id[:8] or "(inline)"

    def __getstate__(self) -> dict[str, Any]:
        """Everything except the tokenizer. A copy in another process keeps the token ids that it has here."""
        state = {**self.__dict__, "token_ids": self.token_ids}
        del state["_encode"]
        return state

    def __repr__(self) -> str:
        start = self.text[:40] + "…" if len(self.text) > 40 else self.text
        return f"Chunk(id={self.id!r}, name={self.name!r}, level={self.level}, text={start!r})"


@dataclass(frozen=True)
class ChunkVersion:
    """A chunk that a name stands for, or stood for.

    Attributes:
        chunk: the chunk.
        since: when the name was given to it, in UTC.
        until: when the name was given to another chunk; None if it stands for this one.
    """

    chunk: Chunk
    since: datetime
    until: datetime | None


@dataclass(frozen=True)
class Inline:
    """A text for a composition that need not be registered.

    If its namespace has a chunk of that text and level, it is that chunk. Else its KV entry, and those of chunks that
    are computed after it, stay in memory while there is room, and never go to the store.

    Attributes:
        text: plain text.
        level: 0 for a system prompt, 1 for context.
    """

    text: str
    level: int = LEVEL_CONTEXT


class PageDocument(Protocol):
    """A text from one of LangChain's retrievers: its `Document`."""

    @property
    def page_content(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class TextNode(Protocol):
    """A text from one of LlamaIndex's retrievers: its `TextNode`, `Document` or `NodeWithScore`."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


Text = str | PageDocument | TextNode
"""What can be registered."""

Composable = Chunk | str | Inline | PageDocument | TextNode
"""What can be composed."""


@dataclass(frozen=True)
class Skipped:
    """A text that `register_many(on_error="skip")` left out.

    Attributes:
        index: its place among the given texts.
        name: the name that it was given, or None.
        error: the error that `on_error="raise"` would have raised.
    """

    index: int
    name: str | None
    error: BraidError

    def __str__(self) -> str:
        return f"text {self.index}{f' ({self.name})' if self.name else ''}: {self.error}"


class Registered(list[Chunk]):
    """What `register_many` returns: the chunks, in the order of their texts.

    Attributes:
        skipped: the texts that were left out. Always empty without `on_error="skip"`.
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
        tokens_per_s: the rate since the start; None before the first batch.
        seconds_left: the time left at that rate; None before the first batch.
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
        chunks: how many texts can be registered. The same text counts once.
        tokens: how many tokens they have.
        tokens_to_compute: tokens that have no KV entry yet, including those of a missing anchor.
        bytes_to_write: size of the files that are written for these.
        free_disk_bytes: free space on the store's disk.
        seconds: expected time, at the rate that this model had on this device so far; None if the rate is not known.
        deferred_tokens: tokens that the first question computes, because no anchor was given.
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
"""Bytes that a registration leaves free on the store's disk."""


@dataclass(frozen=True)
class Usage:
    """Where the tokens of one call came from. `prompt_tokens` = cached + computed + repaired.

    Attributes:
        prompt_tokens: tokens of the whole prompt, context and question.
        cached_tokens: tokens taken from KV entries that were there before the call.
        computed_tokens: tokens computed in this call: the question, and chunks that had no entry, but for what the mode
            computed again of them.
        repaired_tokens: context tokens that the mode computed again, with sight of everything before them.
        completion_tokens: tokens generated, including the closing control token.
        budget: that work, and what choosing the tokens took, as a share of computing all tokens of the chunks in all
            layers. 0 if the mode repairs nothing; it may exceed 1.
        exact_tokens: of the cached ones, those that are as in a full prefill: they lead the prompt, and have seen all
            that stands before them. The rest were composed.
        stored_tokens: of all tokens that were computed in this call, those whose entries go to the store.
    """

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    repaired_tokens: int
    completion_tokens: int
    budget: float = 0.0
    exact_tokens: int = 0
    stored_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """How long one call took.

    Attributes:
        load_ms: from its admission until every entry was in memory, except those that it computes itself.
        prefill_ms: computing missing entries and the question, up to the first logits.
        first_token_ms: TTFT, from the start of the call to the first token's id. It includes the time in the queue.
        decode_tokens_per_s: rate after the first token; None with fewer than two tokens.
        compute_ms: the part of `prefill_ms` that computed missing entries. They are written at the same time.
        queue_ms: from the start of the call to its admission. It includes the call's own preparation.
    """

    load_ms: float
    prefill_ms: float
    first_token_ms: float
    decode_tokens_per_s: float | None
    compute_ms: float = 0.0
    queue_ms: float = 0.0


@dataclass(frozen=True)
class Source:
    """A document that an answer could come from.

    Attributes:
        chunk: the document.
        share: its part of the attention that the answer's tokens gave to all documents, from 0 to 1.
    """

    chunk: Chunk
    share: float


@dataclass(frozen=True)
class TokenSources:
    """Where one token of an answer comes from.

    Attributes:
        text: what it added to the answer's text; "" for a control token, and for a part of a character.
        shares: the part of its attention to all documents that each of them got, in the order of `Answer.sources`.
    """

    text: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Certificate:
    """What `Braid.fidelity` measured of one mode. It holds for one model, and for compositions like those measured.

    All figures compare the mode with full prefill of the same tokens, over the questions that were asked.

    Attributes:
        mode: the composition rule, with its parameters.
        weights, tokenizer: fingerprints of the model and of its tokenizer.
        dtype: what it was computed in.
        namespace: the namespace whose chunks were composed.
        fewest_chunks, most_chunks: how many context chunks a composition had.
        anchor: whether a system prompt stood first.
        questions: how many were asked.
        kl: mean KL divergence of the next-token distributions from full prefill's, in nats.
        kl_p95: 95 % of the questions had at most this one.
        top1: share of tokens at which both have the same likeliest token.
        contains, full_contains: share of answers that contain the reference, in this mode and in full prefill; None
            without references.
        budget: what a call computes of the context, as a share of what full prefill computes.
        measured_at: when it was measured, in seconds since 1970.
    """

    mode: str
    weights: str
    tokenizer: str
    dtype: str
    namespace: str
    fewest_chunks: int
    most_chunks: int
    anchor: bool
    questions: int
    kl: float
    kl_p95: float
    top1: float
    contains: float | None
    full_contains: float | None
    budget: float
    measured_at: float

    def fits(self, chunks: int, *, anchor: bool) -> bool:
        """Whether compositions of so many context chunks, with a system prompt first or without, were measured."""
        return self.fewest_chunks <= chunks <= self.most_chunks and self.anchor == anchor

    def __str__(self) -> str:
        chunks = " to ".join(map(str, dict.fromkeys((self.fewest_chunks, self.most_chunks))))
        held = "" if self.contains is None else f", {self.contains:.0%} contain the reference"
        return (
            f"{self.mode}: KL {self.kl:.2g} to full prefill, {self.top1:.1%} have the same likeliest token{held} "
            f"({_counted(self.questions, 'question')} over {chunks} chunks)"
        )


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: the generated text without control tokens. It ends before a stop string or stop id.
        token_ids: the generated ids, including the closing control token if there is one.
        prompt_ids: the ids of the whole prompt, as a full prefill would compute them.
        finish_reason: "stop" if the model, a stop string or a stop id ended it, "length" if it ran out of tokens.
        usage: where the prompt's tokens came from.
        timings: how long it took.
        sources: with `sources=True` the documents, the one first that got most attention; else None. Their shares add
            up to 1. Documents are the composed chunks but for the system prompt that stands first; one that stands
            twice counts once, with both shares. What system prompt, control tokens, history, question and answer got is
            not counted, so a token that hardly looked at the documents weighs little.
        token_sources: with `sources=True` the same of each token, one for each of `token_ids`; else None.
        fidelity: what `Braid.fidelity` measured of this mode, for this model and as many chunks; None if it did not.
        stop_string: the stop string that ended the text; None if none did.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings
    sources: tuple[Source, ...] | None = None
    token_sources: tuple[TokenSources, ...] | None = None
    fidelity: Certificate | None = None
    stop_string: str | None = None

    def __str__(self) -> str:
        return self.text

    def plot_sources(self, ax: Any = None) -> Any:
        """Draw a heat map with matplotlib: a column for each token of the answer, a row for each document, the one
        first that got most attention. The extra `viz` installs what it needs.

        Args:
            ax: matplotlib's axes to draw on; None makes a figure.

        Returns:
            These axes. `answer.plot_sources().figure.savefig("sources.png")` writes an image.

        Raises:
            BraidError: matplotlib is not installed.
            InputError: the answer has no sources.
        """
        if not self.sources or self.token_sources is None:
            got = "none" if self.sources is None else "no document"
            raise InputError(
                f"plot_sources must be given an answer with sources; got {got}. Compose documents, and ask with "
                "sources=True."
            )
        rows = [f"{source.chunk.label}  {source.share:.0%}" for source in self.sources]
        shares = list(zip(*(token.shares for token in self.token_sources), strict=True))
        return heat_map(ax, [token.text for token in self.token_sources], rows, shares)


@dataclass(frozen=True)
class ExplainedChunk:
    """One chunk of a composition, as `Context.explain` sees it.

    Attributes:
        label: the chunk's name or the start of its id; "(header)" for the control tokens that no chunk owns.
        chunk_id: its id; None for the header.
        position: absolute position of its first token.
        tokens: how many tokens it has.
        after: labels of the chunks that its entry is computed after.
        hit: whether its KV entry is there.
        where: "memory" or "store" for a hit, "nowhere" for a miss.
        reason: why it is a miss, or where the hit is, in words.
        kv_bytes: size of its KV entry, including the padding to whole pages.
        expected_ms: how long it should take until it is in memory, by reading or computing it at the rates measured so
            far; 0 if it is there, None if no rate is known.
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
        notes: special cases that the mode met.
    """

    mode: str
    chunks: tuple[ExplainedChunk, ...]
    notes: tuple[str, ...]

    @property
    def hits(self) -> int:
        """How many chunks have a KV entry."""
        return sum(chunk.hit for chunk in self.chunks)

    @property
    def misses(self) -> int:
        """How many chunks need a KV entry that must be computed."""
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
        """Expected time to read entries from the store; None if no rate is known."""
        return self._expected("store")

    @property
    def expected_compute_ms(self) -> float | None:
        """Expected time to compute missing entries; None if no rate is known."""
        return self._expected("nowhere")

    @property
    def expected_ms(self) -> float | None:
        """Expected time until the whole context is in memory; None if no rate is known."""
        load, compute = self.expected_load_ms, self.expected_compute_ms
        return None if load is None or compute is None else load + compute

    def _expected(self, where: str) -> float | None:
        times = [chunk.expected_ms for chunk in self.chunks if chunk.where == where]
        return None if None in times else sum(time for time in times if time is not None)

    def beside(self, answer: "Answer") -> str:
        """A table for people, of what was expected and what the call then took.

        Args:
            answer: the answer of a call on the same context, right after it was explained.
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
        model: the name that the model was last opened by, or the start of its weights' fingerprint.
        dtype: the dtype that they were computed in.
        level: 0 for system prompts, 1 for context, 3 for what modes computed again and kept.
        entries: how many entries there are.
        bytes: size of their KV on disk, including padding.
    """

    model: str
    dtype: str
    level: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class Stats:
    """What a store holds, how often it had what was needed, and how busy the engine is. `str()` gives a few lines.

    A hit is an entry that a call found in memory or in the store. A miss is an entry that it had to compute.
    Registering counts as neither.

    Attributes:
        chunks: registered chunks of all namespaces.
        entries: stored KV entries.
        bytes: size of their KV on disk.
        damaged: files set aside so far.
        groups: entries by model, dtype and level.
        hits, misses: counts since this Braid was opened.
        all_hits, all_misses: counts of this process, and of every process that used this store and closed it.
        pool_used_bytes: KV memory of resident entries and running calls.
        pool_capacity_bytes: KV memory that the pool has.
        running: requests that are admitted and have not ended: they load, compute, decode or write.
        waiting: requests that wait for memory or a place.
        steps: the engine's steps since this Braid was opened.
        step_tokens: tokens that all steps computed, in prefill or decoding.
        last_step_rows: answers that got a token in the last step.
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
        """Average number of tokens that a step computed."""
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
    """A number of bytes for people, in decimal units: "1.2 GB"."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} GB"


def milliseconds(time: float | None) -> str:
    """A time for people: "3.2 ms", or "-" if it is not known."""
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
