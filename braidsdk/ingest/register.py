"""Store checked texts, and compute the KV entries that are missing."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter, sleep

from braidsdk.cache.pool import Pool
from braidsdk.compose.modes import compose
from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request
from braidsdk.engine.scheduler import REGISTRATIONS, Priority
from braidsdk.errors import InputError
from braidsdk.ingest.check import Candidate, skipped_text
from braidsdk.ingest.plan import Plan
from braidsdk.store import ChunkRow, EntryKey
from braidsdk.store.claims import Claiming
from braidsdk.types import Chunk, Progress, Skipped

GROUP_TOKENS = {"cpu": 2048, "cuda": 4096}
"""Tokens that are computed and written as one request, by device. An interruption loses at most this many."""

PAUSE_S = (0.005, 0.05)
"""The shortest and the longest time between two looks at what another process computes."""


def store_chunks(
    engine: Engine, candidates: Sequence[Candidate], *, replace_names: bool, skip: bool
) -> tuple[list[ChunkRow], list[Skipped]]:
    """Register the texts in one transaction. With `skip`, one that can't be registered is left out without an error."""
    new = [each.new for each in candidates]
    try:
        if not skip:
            return engine.store.add_chunks(new, replace=replace_names), []
        results = engine.store.add_good_chunks(new, replace=replace_names)
    except BaseException:
        _forget(engine, candidates)
        raise
    each = list(zip(candidates, results, strict=True))
    refused = [(candidate, error) for candidate, error in each if isinstance(error, InputError)]
    _forget(engine, [candidate for candidate, _ in refused])
    skipped = [skipped_text(candidate.index, candidate.new.name, error) for candidate, error in refused]
    return [row for _, row in each if not isinstance(row, InputError)], skipped


def _forget(engine: Engine, candidates: Sequence[Candidate]) -> None:
    """Remember nothing of texts that are not registered."""
    for each in candidates:
        engine.layout.forget(each.new.text)


def compute_missing(
    engine: Engine, planned: Plan, registered: Sequence[Chunk], on_progress: Callable[[Progress], None] | None
) -> None:
    """Compute and store the plan's missing entries of the registered chunks, group by group. Groups that are stored
    stay stored if a later one fails. While one group is written, the next ones are computed. What another process
    computes meanwhile is waited for instead."""
    ids = dict.fromkeys(chunk.id for chunk in registered)
    lacking = [planned.missing[each] for each in ids if each in planned.missing]
    total, done, done_chunks = sum(len(key.token_ids) for _, key in lacking), 0, 0
    started = perf_counter()

    def report(some: Sequence[tuple[Chunk, EntryKey]] = ()) -> None:
        nonlocal done, done_chunks
        done += sum(len(key.token_ids) for _, key in some)
        done_chunks += len(some)
        if on_progress:
            rate = done / (perf_counter() - started) if done else None
            left = None if rate is None else (total - done) / rate
            on_progress(Progress(done, total, done_chunks, len(lacking), rate, left))

    if not lacking:
        return
    report()
    with engine.store.claims.begin() as claims:
        before = _claimed_before(engine, claims, planned)
        while lacking:
            mine, others, there = _claimed(engine, claims, lacking)
            if there:
                report(there)
            for group in _computed(engine, planned, before, mine):
                claims.release((*before, *(key for _, key in group)))
                before = ()
                report(group)
            if others and not mine and not there:
                sleep(random.uniform(*PAUSE_S))
            lacking = others


def _claimed(
    engine: Engine, claims: Claiming, lacking: Sequence[tuple[Chunk, EntryKey]]
) -> tuple[list[tuple[Chunk, EntryKey]], list[tuple[Chunk, EntryKey]], list[tuple[Chunk, EntryKey]]]:
    """Of missing entries: those that this job computes now, those that others compute, and those that others have
    stored since. They are claimed before they are looked up, so that none is stored in between."""
    keys = [key for _, key in lacking]
    each = list(zip(lacking, claims.take(keys), engine.store.look_up(keys), strict=True))
    claims.release(key for (_, key), mine, hit in each if mine and hit)
    return (
        [one for one, mine, hit in each if mine and not hit],
        [one for one, mine, hit in each if not mine and not hit],
        [one for one, _, hit in each if hit],
    )


def _claimed_before(engine: Engine, claims: Claiming, planned: Plan) -> tuple[EntryKey, ...]:
    """The entries before the chunks' that this job computes with its first group: those that the store lacks and nobody
    else computes."""
    while planned.lacks_before:
        taken = claims.take(planned.before)
        lacks = [hit is None for hit in engine.store.look_up(planned.before)]
        if all(mine for mine, lacking in zip(taken, lacks, strict=True) if lacking):
            return tuple(key for key, lacking in zip(planned.before, lacks, strict=True) if lacking)
        claims.release(planned.before)
        sleep(random.uniform(*PAUSE_S))
    return ()


def _computed(
    engine: Engine, planned: Plan, before: Sequence[EntryKey], lacking: Sequence[tuple[Chunk, EntryKey]]
) -> Iterator[list[tuple[Chunk, EntryKey]]]:
    """Compute and store entries, group by group."""
    running: deque[tuple[list[tuple[Chunk, EntryKey]], Request]] = deque()
    groups = _groups(lacking, engine.pool, GROUP_TOKENS[engine.device.type] if planned.anchor else 1)
    try:
        while True:
            while len(running) < REGISTRATIONS and (group := next(groups, None)):
                running.append((group, engine.submit(_request(engine, planned, group, before))))
            if not running:
                return
            running[0][1].result()
            yield running.popleft()[0]
    finally:
        for _, request in running:
            engine.cancel(request)


def _request(
    engine: Engine, planned: Plan, group: Sequence[tuple[Chunk, EntryKey]], before: Sequence[EntryKey]
) -> Request:
    """The request that computes and stores some chunks, and entries before them that the store lacks."""
    chunks = [chunk for chunk, _ in group]
    composition = compose([planned.anchor, *chunks] if planned.anchor else chunks, layout=engine.layout)
    return Request(
        priority=Priority.REGISTRATION,
        submitted=perf_counter(),
        decodes=False,
        namespace=engine.namespace,
        composition=composition,
        keys=(*planned.before, *(key for _, key in group)),
        computes=frozenset((*before, *(key for _, key in group))),
        counted=False,
    )


def _groups(
    lacking: Sequence[tuple[Chunk, EntryKey]], pool: Pool, most_tokens: int
) -> Iterator[list[tuple[Chunk, EntryKey]]]:
    """Cut the list into groups of at most `most_tokens`, or of one entry, that fit into a quarter of the pool."""
    room = min(pool.capacity_pages // 4, 2 * pool.pages_for(most_tokens)) * pool.page_bytes
    group: list[tuple[Chunk, EntryKey]] = []
    tokens = taken = 0
    for chunk, key in lacking:
        more = len(key.token_ids)
        if group and (tokens + more > most_tokens or taken + pool.bytes_for(more) > room):
            yield group
            group, tokens, taken = [], 0, 0
        group.append((chunk, key))
        tokens += more
        taken += pool.bytes_for(more)
    if group:
        yield group
