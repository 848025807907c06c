"""Registering texts: check them, say what they will take, store them, compute what is missing.

Each stage is a function, and each result a value that the next one takes.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from braidsdk.cache.pool import Pool
from braidsdk.compose import Composition, check_length, check_window, compose
from braidsdk.engine.batch import Run, forward
from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request
from braidsdk.engine.scheduler import REGISTRATIONS, Priority
from braidsdk.errors import InputError, PoolFullError, StoreFullError
from braidsdk.store import ChunkRow, EntryKey, NewChunk, chunk_id
from braidsdk.tokens import normalise
from braidsdk.types import (
    LEVEL_CONTEXT,
    LEVEL_SYSTEM,
    MARGIN_BYTES,
    Chunk,
    Progress,
    RegistrationEstimate,
    Skipped,
    size,
)

WORTH_MEASURING_TOKENS = 4096
"""From so many tokens on an unknown rate is measured before their expected time is given."""

PROBE_TOKENS = 512
"""Computed, and thrown away, to measure an unknown rate; a rate of fewer tokens is not trusted with many."""

GROUP_TOKENS = {"cpu": 2048, "cuda": 4096}
"""Tokens that are computed and written as one request, by device: what an interruption loses at most."""

FILE_BYTES = 8192
"""What an entry's file holds besides keys and values: its header, and the rest of the last block on the disk."""

TOKEN_BYTES = 8
"""Per token, its id and its text."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A text that passed its checks.

    Attributes:
        index: its place among the texts given.
        new: what the store registers.
        chunk: the chunk that it will be.
    """

    index: int
    new: NewChunk
    chunk: Chunk


@dataclass(frozen=True)
class Plan:
    """What a registration computes.

    Attributes:
        anchor: what the chunks stand after, or None.
        deferred: whether nothing is computed now.
        before: keys of what the chunks are computed after.
        missing: each chunk whose entry the store lacks and the entry's key, by the chunk's id.
        lacks_before: whether the store lacks the entries of `before` too.
    """

    anchor: Chunk | None
    deferred: bool
    before: tuple[EntryKey, ...]
    missing: Mapping[str, tuple[Chunk, EntryKey]]
    lacks_before: bool

    @property
    def keys(self) -> list[EntryKey]:
        """Of all entries that are computed and written."""
        before = self.before if self.missing and self.lacks_before else ()
        return [*(key for _, key in self.missing.values()), *before]


def text_of(given: object) -> tuple[object, Mapping[str, Any] | None]:
    """The text and the metadata of what a caller registers: a str, or an object of LangChain or LlamaIndex.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(given, str):
        return given, None
    node = getattr(given, "node", given)  # LlamaIndex: a node with its score
    for name in ("page_content", "text"):
        if hasattr(node, name):
            return getattr(node, name), getattr(node, "metadata", None) or None
    raise InputError(
        f"The text must be text, or an object with page_content or text; got a {type(given).__name__}. Pass its text."
    )


def check_anchor(anchor: Chunk | None, level: int) -> None:
    """Raises:
    InputError: there is no such level, or it does not go with the anchor.
    """
    if type(level) is not int or level not in (LEVEL_SYSTEM, LEVEL_CONTEXT):
        raise InputError(f"level must be 0 (system prompt) or 1 (context); got {level!r}.")
    if anchor and (anchor.level != LEVEL_SYSTEM or level == LEVEL_SYSTEM):
        raise InputError(
            f"A context chunk is anchored to a level-0 chunk; got a chunk of level {level} anchored to one of level "
            f"{anchor.level}. Register the anchor with register_system, and system prompts without an anchor."
        )


def check_texts(
    engine: Engine,
    texts: Sequence[object],
    names: Sequence[str | None],
    metadata: Sequence[Mapping[str, Any] | None],
    anchor: Chunk | None,
    level: int,
    *,
    skip: bool,
) -> tuple[list[Candidate], list[Skipped]]:
    """Check texts one by one; with `skip` one that can't be registered is left out instead of raised.

    Raises:
        InputError, PoolFullError: as `Braid.register`.
    """
    good, skipped = [], []
    for index, (text, name, extra) in enumerate(zip(texts, names, metadata, strict=True)):
        try:
            good.append(_check(engine, index, text, name, extra, anchor, level))
        except (InputError, PoolFullError) as error:
            if not skip:
                raise
            skipped.append(Skipped(index, name if isinstance(name, str) else None, error))
    return good, skipped


def _check(
    engine: Engine,
    index: int,
    given: object,
    name: str | None,
    metadata: Mapping[str, Any] | None,
    anchor: Chunk | None,
    level: int,
) -> Candidate:
    text, own = text_of(given)
    remedy = "Split it into chunks and register each."
    if isinstance(text, str):
        check_length(text, engine.config.window, "This text", remedy)
    clean = normalise(text)  # type: ignore[arg-type]  # which checks it
    if name is not None and not isinstance(name, str):
        raise InputError(f"name must be text; got a {type(name).__name__}. Pass a str, or leave it out.")
    ident = chunk_id(engine.namespace, level, clean)
    chunk = Chunk(ident, engine.namespace, level, clean, _encode=engine.layout.chunk_ids)
    tokens = len(chunk.token_ids) + (len(anchor.token_ids) if anchor else 0)
    check_window(tokens, engine.config.window, "This text", remedy)
    engine.pool.check_fits([tokens])
    new = NewChunk(engine.namespace, level, clean, name, own if metadata is None else metadata)
    return Candidate(index, new, chunk)


def plan(engine: Engine, candidates: Sequence[Candidate], anchor: Chunk | None, level: int) -> Plan:
    """What the store lacks of the entries that default compositions of these chunks need."""
    chunks = list({each.chunk.id: each.chunk for each in candidates}.values())
    if anchor is None and level != LEVEL_SYSTEM:
        return Plan(None, True, (), {}, False)
    before = engine.keys(compose([anchor], layout=engine.layout)) if anchor else ()
    alone = [compose([anchor, chunk] if anchor else [chunk], layout=engine.layout) for chunk in chunks]
    keys = [engine.keys(composition, before)[-1] for composition in alone]
    found = engine.store.look_up([*before, *keys])
    lacking = [each is None for each in found]
    missing = zip(chunks, keys, lacking[len(before) :], strict=True)
    return Plan(
        anchor=anchor,
        deferred=False,
        before=before,
        missing={chunk.id: (chunk, key) for chunk, key, lacks in missing if lacks},
        lacks_before=any(lacking[: len(before)]),
    )


def estimate(engine: Engine, candidates: Sequence[Candidate], planned: Plan) -> RegistrationEstimate:
    """What the plan will take. Measures the model's rate if that is unknown and the texts are long."""
    chunks = {each.chunk.id: each.chunk for each in candidates}.values()
    tokens = sum(len(chunk.token_ids) for chunk in chunks)
    to_write = sum(
        engine.pool.bytes_for(len(key.token_ids)) + FILE_BYTES + TOKEN_BYTES * len(key.token_ids)
        for key in planned.keys
    )
    absent = [key for key in planned.keys if engine.pool.find(key.digest) is None]
    to_compute = sum(len(key.token_ids) for key in absent)
    expected = RegistrationEstimate(
        chunks=len(chunks),
        tokens=tokens,
        tokens_to_compute=to_compute,
        bytes_to_write=to_write,
        free_disk_bytes=engine.store.free_bytes,
        seconds=0.0,
        deferred_tokens=tokens if planned.deferred else 0,
    )
    if not to_compute:
        return expected
    unknown = engine.rates.amount("compute") < PROBE_TOKENS
    if unknown and to_compute >= WORTH_MEASURING_TOKENS and expected.fits:
        _measure(engine, [token for key in absent[:PROBE_TOKENS] for token in key.token_ids])
    return replace(expected, seconds=engine.rates.seconds_for("compute", to_compute))


def check_disk(engine: Engine, expected: RegistrationEstimate) -> None:
    """Refuse what the disk has no room for, before anything is computed or written.

    Raises:
        StoreFullError: it has none.
    """
    if not expected.fits:
        raise StoreFullError(
            f"Expected room for {size(expected.bytes_to_write)}, and {size(MARGIN_BYTES)} to spare, on the disk of the "
            f"store at {engine.store.path}; {size(expected.free_disk_bytes)} is free. Free some space, register fewer "
            "texts, or open a store on another disk. Nothing was computed or written."
        )


def store_chunks(
    engine: Engine, candidates: Sequence[Candidate], *, replace_names: bool, skip: bool
) -> tuple[list[ChunkRow], list[Skipped]]:
    """Register the texts in one transaction; with `skip` one that can't be is left out instead of raised."""
    new = [each.new for each in candidates]
    if not skip:
        return engine.store.add_chunks(new, replace=replace_names), []
    rows, skipped = [], []
    for candidate, result in zip(candidates, engine.store.add_good_chunks(new, replace=replace_names), strict=True):
        if isinstance(result, InputError):
            skipped.append(Skipped(candidate.index, candidate.new.name, result))
        else:
            rows.append(result)
    return rows, skipped


def compute_missing(
    engine: Engine, planned: Plan, registered: Sequence[Chunk], on_progress: Callable[[Progress], None] | None
) -> None:
    """Compute and store the plan's missing entries of the chunks that were registered, group by group: what is stored
    stays so. The next groups are computed while one is written."""
    ids = dict.fromkeys(chunk.id for chunk in registered)
    lacking = [planned.missing[each] for each in ids if each in planned.missing]
    total, done, done_chunks = sum(len(key.token_ids) for _, key in lacking), 0, 0
    started = perf_counter()

    def report() -> None:
        if on_progress:
            rate = done / (perf_counter() - started) if done else None
            left = None if rate is None else (total - done) / rate
            on_progress(Progress(done, total, done_chunks, len(lacking), rate, left))

    if lacking:
        report()
    running: deque[tuple[list[tuple[Chunk, EntryKey]], Request]] = deque()
    groups = _groups(lacking, engine.pool, GROUP_TOKENS[engine.device.type] if planned.anchor else 1)
    try:
        while True:
            while len(running) < REGISTRATIONS and (group := next(groups, None)):
                running.append((group, engine.submit(_request(engine, planned, group))))
            if not running:
                return
            running[0][1].result()
            group, _ = running.popleft()
            done += sum(len(key.token_ids) for _, key in group)
            done_chunks += len(group)
            report()
    finally:
        for _, request in running:
            engine.cancel(request)


def _request(engine: Engine, planned: Plan, group: Sequence[tuple[Chunk, EntryKey]]) -> Request:
    """The registration of some chunks."""
    chunks = [chunk for chunk, _ in group]
    composition: Composition = compose([planned.anchor, *chunks] if planned.anchor else chunks, layout=engine.layout)
    before = planned.before if planned.lacks_before else ()
    return Request(
        priority=Priority.REGISTRATION,
        submitted=perf_counter(),
        decodes=False,
        composition=composition,
        keys=(*planned.before, *(key for _, key in group)),
        computes=frozenset(key.digest for key in (*before, *(key for _, key in group))),
        counted=False,
    )


def _measure(engine: Engine, token_ids: Sequence[int]) -> None:
    """Compute some tokens and throw them away, to learn how fast that is; nothing if the pool has no room now."""
    ids = tuple(token_ids[: min(PROBE_TOKENS, engine.config.window)])
    model, pool = engine.model, engine.pool

    def work() -> None:
        try:
            pages = pool.take(len(ids))
        except PoolFullError:
            return
        try:
            pool.clear(pages)
            started = perf_counter()
            forward(model, pool, [Run(ids, (), pages, 0, 0)])
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            engine.rates.add("compute", len(ids), perf_counter() - started)
        finally:
            pool.give_back(pages)

    engine.call(work)


def _groups(
    lacking: Sequence[tuple[Chunk, EntryKey]], pool: Pool, most_tokens: int
) -> Iterator[list[tuple[Chunk, EntryKey]]]:
    """Consecutive ones of at most `most_tokens` together, or one alone, that fit in a quarter of the pool."""
    room = min(pool.capacity_pages // 4, 2 * pool.pages_for(most_tokens))
    group: list[tuple[Chunk, EntryKey]] = []
    tokens = pages = 0
    for chunk, key in lacking:
        more = len(key.token_ids)
        if group and (tokens + more > most_tokens or pages + pool.pages_for(more) > room):
            yield group
            group, tokens, pages = [], 0, 0
        group.append((chunk, key))
        tokens += more
        pages += pool.pages_for(more)
    if group:
        yield group
