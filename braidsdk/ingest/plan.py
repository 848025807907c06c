"""What a registration has to compute, and what that takes: tokens, bytes, time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from braidsdk.compose.modes import compose
from braidsdk.engine.batch import Run, forward
from braidsdk.engine.engine import Engine
from braidsdk.errors import PoolFullError, StoreFullError
from braidsdk.ingest.check import Candidate
from braidsdk.store import EntryKey
from braidsdk.types import LEVEL_SYSTEM, MARGIN_BYTES, Chunk, RegistrationEstimate, size

WORTH_MEASURING_TOKENS = 4096
"""From so many tokens on an unknown rate is measured before their expected time is given."""

PROBE_TOKENS = 512
"""Computed, and thrown away, to measure an unknown rate; a rate of fewer tokens is not trusted with many."""

FILE_BYTES = 8192
"""What an entry's file holds besides keys and values: its header, and the rest of the last block on the disk."""

TOKEN_BYTES = 8
"""Per token, its id and its text."""


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
