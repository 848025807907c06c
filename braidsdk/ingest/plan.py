"""What a registration has to compute, and what that takes in tokens, bytes and time."""

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
"""If the rate is unknown and there are at least this many tokens, the rate is measured before a time is expected."""

PROBE_TOKENS = 512
"""Tokens that are computed and thrown away to measure an unknown rate. A rate measured on fewer is not trusted."""

FILE_BYTES = 8192
"""What an entry's file holds besides keys and values: its header, and the rest of the last block on the disk."""

TOKEN_BYTES = 8
"""What an entry's file holds per token besides keys and values: its id and its text."""


@dataclass(frozen=True)
class Plan:
    """What a registration computes.

    Attributes:
        anchor: what the chunks stand after, or None.
        deferred: whether everything is computed later, by the first question.
        before: keys of the entries that the chunks are computed after.
        missing: the chunks that have no entry in the store, each with the entry's key, by the chunk's id.
        lacks_before: whether the store lacks the entries of `before` too.
    """

    anchor: Chunk | None
    deferred: bool
    before: tuple[EntryKey, ...]
    missing: Mapping[str, tuple[Chunk, EntryKey]]
    lacks_before: bool

    @property
    def keys(self) -> list[EntryKey]:
        """The keys of all entries that are computed and written."""
        before = self.before if self.missing and self.lacks_before else ()
        return [*(key for _, key in self.missing.values()), *before]


def plan(engine: Engine, candidates: Sequence[Candidate], anchor: Chunk | None, level: int) -> Plan:
    """Find out which entries the store lacks, of those that default compositions of these chunks need."""
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
    """Estimate what the plan will take. Measures the model's rate if it is unknown and the texts are long."""
    chunks = {each.chunk.id: each.chunk for each in candidates}.values()
    tokens = sum(len(chunk.token_ids) for chunk in chunks)
    of_token = engine.pool.page_bytes // engine.pool.page_size + TOKEN_BYTES
    to_write = sum(FILE_BYTES + of_token * len(key.token_ids) for key in planned.keys)
    absent = [key for key in planned.keys if engine.pool.find(key) is None]
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
    """Refuse a registration that does not fit on the disk, before anything is computed or written.

    Raises:
        StoreFullError: it does not fit.
    """
    if not expected.fits:
        raise StoreFullError(
            f"The disk of the store at {engine.store.path} must have room for {size(expected.bytes_to_write)} and "
            f"{size(MARGIN_BYTES)} to spare; got {size(expected.free_disk_bytes)} free. Free some space, register "
            "fewer texts, or open a store on another disk. Nothing was computed or written."
        )


def _measure(engine: Engine, token_ids: Sequence[int]) -> None:
    """Compute some tokens and throw them away, to learn how fast that is. Does nothing if the pool has no room now."""
    ids = tuple(token_ids[: min(PROBE_TOKENS, engine.config.window)])

    def work() -> None:
        model, pool = engine.model, engine.pool
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
