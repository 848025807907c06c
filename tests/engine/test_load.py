"""Everything at once: threads, tasks, streams that are closed anywhere, deletions and registrations.

Answers are those of questions asked alone, and afterwards nothing is lost.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from braidsdk import Braid, Context
from braidsdk.errors import UnknownChunkError

SYSTEM = "The harbour opens at six. Boats wait for the tide, and the pilot for the boats."
TEXTS = [f"Document {n}. " + "Ropes, nets and lamps are sold on the quay. " * (1 + 3 * n) for n in range(6)]
DOOMED = [f"Notice {n}: this is taken down again soon." for n in range(3)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 8, "top_p": 0.9, "repetition_penalty": 1.2},
    {"stop": ["e", "a"]},
]
TOKENS = 16
WAIT_S = 110.0


@dataclass
class Load:
    """What is asked, what the answers are, and what came."""

    braid: Braid
    started: Callable[..., Any]
    seed: int
    contexts: list[Context] = field(default_factory=list)
    alone: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    answered: int = 0
    closed: int = 0
    cancelled: int = 0
    deleted: int = 0
    refused: int = 0

    def prepare(self) -> None:
        system = self.braid.register_system(SYSTEM)
        documents = self.braid.register_many(TEXTS, anchor=system, progress=False)
        self.contexts = [self.braid.compose([system, *documents[n : n + 2]]) for n in range(5)]
        self.contexts.append(self.braid.compose([documents[3], documents[0]], mode="isolated"))
        self.contexts.append(self.braid.compose([system, documents[2], documents[1]], mode="exact"))
        for which, context in enumerate(self.contexts):
            for how, options in enumerate(OPTIONS):
                answer = context.ask("Well?", max_new_tokens=TOKENS, **options)
                self.alone[which, how] = answer.token_ids

    def pick(self, dice: random.Random) -> tuple[tuple[int, int], Context, dict[str, Any]]:
        which, how = dice.randrange(len(self.contexts)), dice.randrange(len(OPTIONS))
        return (which, how), self.contexts[which], {**OPTIONS[how], "max_new_tokens": TOKENS}

    def thread(self, number: int, asks: int) -> None:
        """Ask, and read streams; three of ten are closed or dropped at some token."""
        dice = random.Random(f"{self.seed} thread {number}")
        for _ in range(asks):
            case, context, options = self.pick(dice)
            stream = context.stream("Well?", **options)
            if dice.random() < 0.3:
                for _ in range(dice.randrange(TOKENS)):
                    next(stream, None)
                if dice.random() < 0.5:
                    stream.close()
                del stream
                self.closed += 1
                continue
            if dice.random() < 0.5:
                for _ in stream:
                    pass
                answer = stream.answer
            else:
                answer = context.ask("Well?", **options)
            assert answer.token_ids == self.alone[case], case
            self.answered += 1

    async def task(self, number: int, asks: int) -> None:
        """Ask, and read streams, and be cancelled now and then."""
        dice = random.Random(f"{self.seed} task {number}")
        for _ in range(asks):
            case, context, options = self.pick(dice)
            if dice.random() < 0.3:
                asking = asyncio.create_task(self.read(context, options))
                await asyncio.sleep(dice.random() * 0.1)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                self.cancelled += 1
            elif dice.random() < 0.5:
                assert (await self.read(context, options)) == self.alone[case], case
                self.answered += 1
            else:
                assert (await context.aask("Well?", **options)).token_ids == self.alone[case], case
                self.answered += 1

    async def read(self, context: Context, options: dict[str, Any]) -> tuple[int, ...]:
        async with context.astream("Well?", **options) as stream:
            async for _ in stream:
                pass
        return stream.answer.token_ids

    def tasks(self, count: int, asks: int) -> None:
        async def together() -> None:
            await asyncio.gather(*(self.task(number, asks) for number in range(count)))

        asyncio.run(together())

    def deleter(self, number: int, done: threading.Event) -> None:
        """Register notices, ask over them, and delete them under the questions of others."""
        dice, system = random.Random(f"{self.seed} deleter {number}"), self.braid.register_system(SYSTEM)
        while not done.is_set():
            text = dice.choice(DOOMED)
            try:
                notice = self.braid.register(text, anchor=system)
                self.braid.ask("Well?", chunks=[system, notice], max_new_tokens=2)
                if dice.random() < 0.5:
                    self.braid.chunks.delete(notice)
                    self.deleted += 1
            except UnknownChunkError:
                self.refused += 1

    def run(self, threads: int, asks: int, tasks: int, task_asks: int) -> None:
        done = threading.Event()
        submit = self.started
        deleters = [submit(self.deleter, number, done) for number in range(2)]
        running = [submit(self.thread, number, asks) for number in range(threads)]
        running.append(submit(self.tasks, tasks, task_asks))
        try:
            for each in running:
                each.result(WAIT_S)
        finally:
            done.set()
        for each in deleters:
            each.result(WAIT_S)

    def check(self, settled: Callable[[Braid], None]) -> None:
        assert self.answered
        assert self.closed
        assert self.cancelled
        assert self.deleted
        settled(self.braid)
        for (which, how), want in self.alone.items():
            got = self.contexts[which].ask("Well?", max_new_tokens=TOKENS, **OPTIONS[how])
            assert got.token_ids == want
        settled(self.braid)


@pytest.fixture
def load(make_braid: Callable[..., Braid], random_braid: Braid, threads: Any) -> Any:
    """A load on a Braid with a pool that holds about half of all contexts with their answers."""
    seed = int(os.environ.get("BRAID_SEED", time.time_ns() % 1_000_000))
    print(f"BRAID_SEED={seed}")  # noqa: T201 - shown when a test fails
    with make_braid(pool_bytes=40 * random_braid._engine.pool.page_bytes) as braid:
        made = Load(braid, threads.submit, seed)
        made.prepare()
        yield made


def test_all_get_their_answers_and_nothing_is_lost(load: Load, settled: Callable[[Braid], None]) -> None:
    load.run(threads=4, asks=6, tasks=4, task_asks=4)
    load.check(settled)


@pytest.mark.slow
def test_under_minutes_of_load_all_get_their_answers_and_nothing_is_lost(
    load: Load, settled: Callable[[Braid], None]
) -> None:
    load.run(threads=32, asks=5, tasks=20, task_asks=3)  # what is made once is made now
    before = psutil.Process().memory_info().rss
    load.run(threads=32, asks=30, tasks=20, task_asks=10)
    load.check(settled)
    grown = psutil.Process().memory_info().rss - before
    assert grown < 64 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB"
