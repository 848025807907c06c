"""Random work on one namespace of a store, step by step, beside a model of what the store should hold."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import model
from model import Known, Model

from braidsdk.store import ChunkStore, NewChunk

TEXTS = [f"<text {number}>" for number in range(12)]
NAMES = [f"name {number}" for number in range(6)]
KINDS = ("add", "add", "add many", "publish", "publish", "publish", "update", "delete", "load")


class Step(NamedTuple):
    """One call, what it is, and what the store should hold afterwards."""

    kind: str
    then: Model
    call: Callable[[ChunkStore], object]


def universe() -> list[Known]:
    """All entries that the work may publish."""
    after = (None, *TEXTS[:2])
    return [Known(text, each, number) for text in (None, *TEXTS) for each in after for number in (0, 1) if text != each]


def steps(random: random.Random, now: Model) -> Iterator[Step]:
    """Steps for ever. Each is taken to have been done when the next one is asked for."""
    while True:
        step = _step(random, random.choice(KINDS), now)
        yield step
        now = step.then


def _step(random: random.Random, kind: str, now: Model) -> Step:
    then, there, space = now.copy(), list(now.chunks), now.namespace
    if kind in ("add", "add many"):
        count = 1 if kind == "add" else random.randint(2, 4)
        new = [
            NewChunk(space, 1, random.choice(TEXTS), random.choice((None, *NAMES)), _metadata(random))
            for _ in range(count)
        ]
        for each in new:
            then.add(each.text, each.name, each.metadata)
        return Step(kind, then, partial(ChunkStore.add_chunks, new=new, replace=True))
    if kind == "update" and there:
        text, name, metadata = random.choice(there), random.choice((None, *NAMES)), _metadata(random)
        then.add(text, name, metadata)
        given = {"namespace": space, "chunk_id": model.id_of(text, space), "name": name, "metadata": metadata}
        return Step(kind, then, partial(ChunkStore.update_chunk, **given, replace=True))
    if kind == "delete" and there:
        gone = random.sample(there, min(len(there), random.randint(1, 2)))
        then.delete(gone)
        ids = [model.id_of(text, space) for text in gone]
        return Step(kind, then, partial(ChunkStore.delete_chunks, namespace=space, ids=ids))
    able = [each for each in universe() if {each.text, each.after} <= {None, *there}]
    if kind == "load":
        asked = random.sample(able, min(len(able), 5))
        return Step(kind, then, partial(_load, asked=asked, wanted=now.entries.intersection(asked), space=space))
    some = random.sample(able, min(len(able), random.choice((1, 1, 3))))
    then.entries.update(some)
    return Step("publish", then, partial(model.publish, entries=some, namespace=space))


def _load(store: ChunkStore, asked: list[Known], wanted: set[Known], space: str) -> None:
    if (found := model.loaded(store, asked, space)) != wanted:
        raise AssertionError(f"loaded {found} of {asked}; it must be {wanted}")


def _metadata(random: random.Random) -> dict[str, object] | None:
    return random.choice((None, {}, {"v": random.randint(0, 9)}, {"long": "x" * 3000}))
