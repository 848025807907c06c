"""One request: admit it, make the context resident, compute the tail, then a token at a time."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from torch import Tensor

from braidsdk.compose import Composition
from braidsdk.decoding import Decoder, Row
from braidsdk.encode import Run, compute_logits
from braidsdk.engine import Engine, Prepared
from braidsdk.errors import PoolFullError
from braidsdk.kernels.paging import PagedSegment
from braidsdk.lease import Lease
from braidsdk.sampling import Sampler, SamplingParams
from braidsdk.store import EntryKey
from braidsdk.types import Timings, Usage


@dataclass(frozen=True)
class Outcome:
    """What a finished generation knows of itself."""

    usage: Usage
    timings: Timings
    finish_reason: Literal["stop", "length"]


def generate(
    engine: Engine,
    composition: Composition,
    keys: Sequence[EntryKey],
    params: SamplingParams,
    *,
    queued: bool = False,
    started: float | None = None,
    decoder: Decoder | None = None,
) -> Generator[int, int | None, Outcome]:
    """Yield the ids of an answer, one at a time.

    The last id is the one that ended the answer, or the `max_new_tokens`-th. To end it earlier, send how many of its
    ids its text is made of. What was computed then stays resident as a turn of the conversation. Closing the generator
    instead frees all that it holds and keeps nothing. Between two ids other calls may use the engine.

    Args:
        engine: model, pool and store.
        composition: what to continue, with its tail.
        keys: of its segments.
        params: how to choose.
        queued: whether the caller holds `engine.calls`.
        started: when the call began, by `perf_counter`; None is when the first id is asked for.
        decoder: shared with other requests, which then go on together; None is one of its own.

    Raises:
        ClosedError: the engine was closed, before or meanwhile.
        PoolFullError: context and tail do not fit in the pool beside what streams hold.
        NumericsError: the model gave logits that are not finite.
        UnknownChunkError: a chunk was deleted meanwhile, by this or another process.
        StoreError: what was computed can't be written.
    """
    if started is None:
        started = perf_counter()
    said = composition.input_ids if params.repetition_penalty != 1.0 else ()
    sampler = Sampler(params, said)
    lease, prepared = _admit(engine, composition, keys, params.max_new_tokens, queued)
    row = Row(
        sampler,
        _context(composition, prepared),
        lease.pages,
        composition.tail_origin,
        reserved=len(composition.tail) + params.max_new_tokens,
    )
    try:
        with engine.working():
            before_tail = perf_counter()
            decoder = decoder or engine.decoder()
            decoder.admit(row, composition.tail)
            chosen = [decoder.next(row)]
        first_token, decoding = perf_counter(), 0.0
        kept = yield chosen[-1]
        while kept is None and chosen[-1] not in params.stop_ids and len(chosen) < params.max_new_tokens:
            step = perf_counter()
            with engine.working():
                chosen.append(decoder.next(row))
            decoding += perf_counter() - step
            kept = yield chosen[-1]
        with engine.working():
            computed = len(chosen) - 1  # the last one's keys and values were not needed
            _keep_turn(engine, composition, keys, lease, chosen[: computed if kept is None else min(kept, computed)])
    finally:
        if decoder:
            decoder.retire(row)
        engine.give_back(lease)
    return Outcome(
        usage=usage_of(composition, prepared, len(chosen)),
        timings=Timings(
            load_ms=prepared.load_ms,
            prefill_ms=prepared.compute_ms + (first_token - before_tail) * 1e3,
            first_token_ms=(first_token - started) * 1e3,
            decode_tokens_per_s=(len(chosen) - 1) / decoding if len(chosen) > 1 else None,
            compute_ms=prepared.compute_ms,
        ),
        finish_reason="length" if kept is None and chosen[-1] not in params.stop_ids else "stop",
    )


def tail_logits(engine: Engine, composition: Composition, keys: Sequence[EntryKey]) -> Tensor:
    """Logits of the token after the tail, [vocab_size], on the model's device."""
    with engine.working():
        lease = Lease(engine.pool, keys, len(composition.tail))
        try:
            prepared = engine.prepare(composition, keys)
            run = Run(composition.tail, _context(composition, prepared), lease.pages, 0, composition.tail_origin)
            return compute_logits(engine.model, engine.pool, [run])[0]
        finally:
            lease.close()


def usage_of(composition: Composition, prepared: Prepared, completion_tokens: int) -> Usage:
    """Counts of one call."""
    computed = prepared.computed_tokens + len(composition.tail)
    return Usage(
        prompt_tokens=composition.tokens,
        cached_tokens=composition.tokens - computed,
        computed_tokens=computed,
        repaired_tokens=0,
        completion_tokens=completion_tokens,
    )


def _admit(
    engine: Engine, composition: Composition, keys: Sequence[EntryKey], new_tokens: int, queued: bool
) -> tuple[Lease, Prepared]:
    """Reserve the tail and make the context resident; waits once for calls that will end by themselves."""
    try:
        return _try_to_admit(engine, composition, keys, new_tokens)
    except PoolFullError:
        if queued:  # only streams hold what is missing, and they may be waiting for us
            raise
    with engine.calls:
        return _try_to_admit(engine, composition, keys, new_tokens)


def _try_to_admit(
    engine: Engine, composition: Composition, keys: Sequence[EntryKey], new_tokens: int
) -> tuple[Lease, Prepared]:
    with engine.working():
        lease = Lease(engine.pool, keys, len(composition.tail) + new_tokens)
        try:
            return lease, engine.prepare(composition, keys)
        except BaseException:
            lease.close()
            raise


def _keep_turn(
    engine: Engine, composition: Composition, keys: Sequence[EntryKey], lease: Lease, answer_ids: Sequence[int]
) -> None:
    """Leave the tail resident, for the conversation's next turn."""
    if not all(engine.pool.peek(key.digest) for key in keys):
        return  # a chunk was deleted meanwhile: nothing that has seen it stays
    turn = composition.with_turn((*composition.tail, *answer_ids))
    lease.adopt(engine.keys(turn, keys)[-1])


def _context(composition: Composition, prepared: Prepared) -> tuple[PagedSegment, ...]:
    """The segments of a prepared composition."""
    return tuple(
        entry.at(segment.origin) for entry, segment in zip(prepared.entries, composition.segments, strict=True)
    )
