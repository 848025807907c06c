"""One request: make the context resident, compute the tail, then a token at a time."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from torch import Tensor

from braidsdk.compose import Composition
from braidsdk.encode import Run, compute_logits
from braidsdk.engine import Engine, Prepared
from braidsdk.store import EntryKey
from braidsdk.types import Timings, Usage


@dataclass(frozen=True)
class Outcome:
    """What a finished generation knows of itself."""

    usage: Usage
    timings: Timings
    finish_reason: Literal["stop", "length"]


def generate(
    engine: Engine, composition: Composition, keys: Sequence[EntryKey], max_new_tokens: int
) -> Generator[int, None, Outcome]:
    """Yield the ids of the most likely continuation (ties go to the lowest id), one at a time.

    The last id is the one that ended the answer, or the `max_new_tokens`-th. Closing the generator early frees all that
    it holds.
    """
    started = perf_counter()
    with engine.pool.pinned(keys):
        prepared = engine.prepare(composition, keys)
        tail_pages = engine.pool.allocate(len(composition.tail) + max_new_tokens)
        try:
            before_tail = perf_counter()
            logits = _advance(engine, composition, prepared, tail_pages, 0, composition.tail)
            token = int(logits.argmax())
            first_token = perf_counter()
            count, decoding, stops = 1, 0.0, engine.model.config.eos_ids
            yield token
            while token not in stops and count < max_new_tokens:
                step = perf_counter()
                done = len(composition.tail) + count - 1
                token = int(_advance(engine, composition, prepared, tail_pages, done, (token,)).argmax())
                decoding += perf_counter() - step
                count += 1
                yield token
        finally:
            engine.pool.release(tail_pages)
    return Outcome(
        usage=usage_of(composition, prepared, count),
        timings=Timings(
            load_ms=prepared.load_ms,
            prefill_ms=prepared.compute_ms + (first_token - before_tail) * 1e3,
            first_token_ms=(first_token - started) * 1e3,
            decode_tokens_per_s=(count - 1) / decoding if count > 1 else None,
        ),
        finish_reason="stop" if token in stops else "length",
    )


def tail_logits(engine: Engine, composition: Composition, keys: Sequence[EntryKey]) -> Tensor:
    """Logits of the token after the tail, [vocab_size], on the model's device."""
    with engine.pool.pinned(keys):
        prepared = engine.prepare(composition, keys)
        pages = engine.pool.allocate(len(composition.tail))
        try:
            return _advance(engine, composition, prepared, pages, 0, composition.tail)
        finally:
            engine.pool.release(pages)


def usage_of(composition: Composition, prepared: Prepared, completion_tokens: int) -> Usage:
    """Counts of one call."""
    computed = prepared.computed_tokens + len(composition.tail)
    return Usage(
        prompt_tokens=len(composition.input_ids),
        cached_tokens=len(composition.input_ids) - computed,
        computed_tokens=computed,
        repaired_tokens=0,
        completion_tokens=completion_tokens,
    )


def _advance(
    engine: Engine, composition: Composition, prepared: Prepared, pages: Tensor, start: int, token_ids: tuple[int, ...]
) -> Tensor:
    """Compute tokens [start, start + n) of the tail; logits after the last of them."""
    context = tuple(
        entry.at(segment.origin) for entry, segment in zip(prepared.entries, composition.segments, strict=True)
    )
    run = Run(token_ids, context, pages, start, composition.tail_origin)
    return compute_logits(engine.model, engine.pool, run)
