"""Registering texts: check them, say what they will take, store them, compute what is missing.

Each stage is a function, and each result a value that the next one takes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from braidsdk.compose import check_length, check_window, compose
from braidsdk.encode import BATCH_TOKENS, Run, compute
from braidsdk.engine import Engine
from braidsdk.errors import InputError, PoolFullError, StoreFullError
from braidsdk.pool import Pool
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
        missing: for each chunk whose entry the store lacks its key, by the chunk's id.
        before: keys of what these are computed after that the store lacks too.
    """

    anchor: Chunk | None
    deferred: bool
    missing: Mapping[str, EntryKey]
    before: tuple[EntryKey, ...]


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
    tokens = len(engine.layout.chunk_ids(level, clean)) + (len(anchor.token_ids) if anchor else 0)
    check_window(tokens, engine.config.window, "This text", remedy)
    engine.pool.check_fits([tokens])
    new = NewChunk(engine.namespace, level, clean, name, own if metadata is None else metadata)
    ident = chunk_id(engine.namespace, level, clean)
    return Candidate(index, new, Chunk(ident, engine.namespace, level, clean, _encode=engine.layout.chunk_ids))


def plan(engine: Engine, candidates: Sequence[Candidate], anchor: Chunk | None, level: int) -> Plan:
    """What the store lacks of the entries that default compositions of these chunks need."""
    chunks = list({each.chunk.id: each.chunk for each in candidates}.values())
    if anchor is None and level != LEVEL_SYSTEM:
        return Plan(None, True, {}, ())
    before = engine.keys(compose([anchor], layout=engine.layout)) if anchor else ()
    alone = [compose([anchor, chunk] if anchor else [chunk], layout=engine.layout) for chunk in chunks]
    keys = [engine.keys(composition, before)[-1] for composition in alone]
    found = engine.store.look_up([*before, *keys])
    lacking = [each is None for each in found]
    return Plan(
        anchor=anchor,
        deferred=False,
        missing={chunk.id: key for chunk, key, lack in zip(chunks, keys, lacking[len(before) :], strict=True) if lack},
        before=tuple(key for key, lack in zip(before, lacking, strict=False) if lack),
    )


def estimate(engine: Engine, candidates: Sequence[Candidate], planned: Plan) -> RegistrationEstimate:
    """What the plan will take. Measures the model's rate if that is unknown and the texts are long."""
    chunks = {each.chunk.id: each.chunk for each in candidates}.values()
    tokens = sum(len(chunk.token_ids) for chunk in chunks)
    missing = [*planned.missing.values(), *(planned.before if planned.missing else ())]
    to_write = sum(
        engine.pool.bytes_for(len(key.token_ids)) + FILE_BYTES + TOKEN_BYTES * len(key.token_ids) for key in missing
    )
    absent = [key for key in missing if engine.pool.peek(key.digest) is None]
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
    engine: Engine, planned: Plan, chunks: Sequence[Chunk], on_progress: Callable[[Progress], None] | None
) -> None:
    """Compute and store the plan's missing entries of these chunks, batch by batch: what is stored stays so."""
    lacking = list({chunk.id: chunk for chunk in chunks if chunk.id in planned.missing}.values())
    with engine.working():
        engine.disown([planned.missing[chunk.id] for chunk in lacking])
    total, done, done_chunks = sum(len(chunk.token_ids) for chunk in lacking), 0, 0
    started = perf_counter()

    def report() -> None:
        if on_progress:
            rate = done / (perf_counter() - started) if done else None
            left = None if rate is None else (total - done) / rate
            on_progress(Progress(done, total, done_chunks, len(lacking), rate, left))

    if lacking:
        report()
    for group in _groups(lacking, engine.pool, BATCH_TOKENS[engine.model.device.type]):
        pieces = [[planned.anchor, *group]] if planned.anchor else [[chunk] for chunk in group]
        for composition in (compose(piece, layout=engine.layout) for piece in pieces):
            keys = engine.keys(composition)
            with engine.calls, engine.working(), engine.pool.pinned(keys):
                engine.prepare(composition, keys, counted=False)
        done += sum(len(chunk.token_ids) for chunk in group)
        done_chunks += len(group)
        report()


def _measure(engine: Engine, token_ids: Sequence[int]) -> None:
    """Compute some tokens and throw them away, to learn how fast that is; nothing if the pool has no room now."""
    ids = tuple(token_ids[: min(PROBE_TOKENS, engine.config.window)])
    with engine.calls, engine.working():
        try:
            pages = engine.pool.allocate(len(ids))
        except PoolFullError:
            return
        try:
            started = perf_counter()
            compute(engine.model, engine.pool, [Run(ids, (), pages, 0, 0)])
            if engine.model.device.type == "cuda":
                torch.cuda.synchronize(engine.model.device)
            engine.rates.add("compute", len(ids), perf_counter() - started)
        finally:
            engine.pool.release(pages)


def _groups(chunks: Sequence[Chunk], pool: Pool, most_tokens: int) -> Iterator[list[Chunk]]:
    """Consecutive chunks of at most `most_tokens` together, that fit in a quarter of the pool."""
    room = min(pool.capacity_pages // 4, 2 * pool.pages_for(most_tokens))
    group: list[Chunk] = []
    tokens = pages = 0
    for chunk in chunks:
        more = len(chunk.token_ids)
        if group and (tokens + more > most_tokens or pages + pool.pages_for(more) > room):
            yield group
            group, tokens, pages = [], 0, 0
        group.append(chunk)
        tokens += more
        pages += pool.pages_for(more)
    if group:
        yield group
