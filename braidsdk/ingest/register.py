"""Store checked texts, and compute the KV entries that are missing."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from braidsdk.cache.pool import Pool
from braidsdk.compose.modes import compose
from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request
from braidsdk.engine.scheduler import REGISTRATIONS, Priority
from braidsdk.errors import InputError
from braidsdk.ingest.check import Candidate
from braidsdk.ingest.plan import Plan
from braidsdk.store import ChunkRow, EntryKey
from braidsdk.types import Chunk, Progress, Skipped

GROUP_TOKENS = {"cpu": 2048, "cuda": 4096}
"""Tokens that are computed and written as one request, by device. An interruption loses at most this many."""


def store_chunks(
    engine: Engine, candidates: Sequence[Candidate], *, replace_names: bool, skip: bool
) -> tuple[list[ChunkRow], list[Skipped]]:
    """Register the texts in one transaction. With `skip`, one that can't be registered is left out without an error."""
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
    """Compute and store the plan's missing entries of the registered chunks, group by group. Groups that are stored
    stay stored if a later one fails. While one group is written, the next ones are computed."""
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
    """The request that computes and stores some chunks."""
    chunks = [chunk for chunk, _ in group]
    composition = compose([planned.anchor, *chunks] if planned.anchor else chunks, layout=engine.layout)
    before = planned.before if planned.lacks_before else ()
    return Request(
        priority=Priority.REGISTRATION,
        submitted=perf_counter(),
        decodes=False,
        composition=composition,
        keys=(*planned.before, *(key for _, key in group)),
        computes=frozenset((*before, *(key for _, key in group))),
        counted=False,
    )


def _groups(
    lacking: Sequence[tuple[Chunk, EntryKey]], pool: Pool, most_tokens: int
) -> Iterator[list[tuple[Chunk, EntryKey]]]:
    """Cut the list into groups of at most `most_tokens`, or of one entry, that fit into a quarter of the pool."""
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
