"""Requests share steps: how many passes they take, who goes first, and what happens to one when another one fails."""

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from braidsdk import Answer, Braid, Context
from braidsdk.engine.loop import PIECE_TOKENS
from braidsdk.engine.request import Request
from braidsdk.engine.runner import Chosen, Done, EagerRunner, Piece, Row
from braidsdk.engine.scheduler import State
from braidsdk.models.base import Batch

TEXT = "The harbour opens at six. Boats wait for the tide, and the pilot for the boats. " * 3
WAIT_S = 30.0


@pytest.fixture
def context(random_braid: Braid) -> Context:
    composed = random_braid.compose([random_braid.register_system(TEXT)])
    composed.prepare()
    return composed


def tokens_of(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def test_tasks_share_passes(context: Context, passes: Any) -> None:
    questions = [f"Question {n}?" for n in range(8)]
    alone = [context.ask(question, max_new_tokens=8) for question in questions]
    passes.seen.clear()
    passes.hold_until_asked(8)

    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(*(context.aask(question, max_new_tokens=8) for question in questions))

    assert tokens_of(asyncio.run(all_at_once())) == tokens_of(alone)
    assert len(passes.seen) <= 20
    assert max(map(len, passes.seen)) == 8


def test_ask_many_shares_passes(random_braid: Braid, context: Context, passes: Any) -> None:
    questions = [f"Question {n}?" for n in range(8)]
    alone = [context.ask(question, max_new_tokens=8) for question in questions]
    passes.seen.clear()
    together = random_braid.ask_many([(context, question) for question in questions], max_new_tokens=8)
    assert tokens_of(together) == tokens_of(alone)
    assert len(passes.seen) <= 15


def test_threads_share_passes(context: Context, passes: Any, threads: Any) -> None:
    options = [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "seed": 4, "top_p": 0.9}, {"stop": "zq"}]
    alone = [context.ask("Well?", max_new_tokens=16, **each) for each in options]  # type: ignore[arg-type]
    passes.seen.clear()
    passes.hold_until_asked(4)
    asked = [threads.submit(context.ask, "Well?", max_new_tokens=16, **each) for each in options]  # type: ignore[arg-type]
    together = [future.result(WAIT_S) for future in asked]
    assert tokens_of(together) == tokens_of(alone)
    assert max(map(len, passes.seen)) == 4
    assert len(passes.seen) <= 16 + 4


def test_a_long_prefill_is_cut_into_pieces_while_an_answer_runs(
    random_braid: Braid, context: Context, passes: Any, make_braid: Callable[..., Braid], threads: Any
) -> None:
    long = "Rain fell on the roofs of the town. " * 40
    alone = context.ask("Well?", max_new_tokens=120)
    with make_braid("other") as other:
        want = other.ask("So?", chunks=[other.register_system(long)], max_new_tokens=8)
    stream = context.stream("Well?", max_new_tokens=120)
    next(stream)
    passes.hold_until_asked(2)
    passes.seen.clear()
    registering = threads.submit(random_braid.register_system, long)
    for _ in stream:
        pass
    registered = registering.result(WAIT_S)
    assert stream.answer.token_ids == alone.token_ids
    pieces = [runs for runs in passes.seen if max(runs) > 1]
    tokens = len(registered.token_ids)
    assert [sum(runs) - 1 for runs in pieces] == [
        *[PIECE_TOKENS["cpu"]] * (tokens // PIECE_TOKENS["cpu"]),
        tokens % PIECE_TOKENS["cpu"],
    ]
    assert all(runs[0] == 1 for runs in pieces), "the running answer got a token with each piece"
    got = random_braid.ask("So?", chunks=[registered], max_new_tokens=8)
    assert got.usage.computed_tokens == want.usage.computed_tokens
    assert got.token_ids == want.token_ids


def test_a_long_prefill_takes_one_pass_where_nothing_else_runs(random_braid: Braid, passes: Any) -> None:
    registered = random_braid.register_system("Rain fell on the roofs of the town. " * 40)
    assert passes.seen == [[len(registered.token_ids)]]


def test_a_question_goes_before_a_registration_that_came_earlier(
    make_braid: Callable[..., Braid], until: Callable[[Callable[[], object]], None], random_braid: Braid, threads: Any
) -> None:
    page_bytes = random_braid._engine.pool.page_bytes
    with make_braid(pool_bytes=9 * page_bytes) as braid:
        context = braid.compose([braid.register_system("Short.")])
        want = context.ask("So?", max_new_tokens=4).token_ids
        with context.stream("Well?", max_new_tokens=300) as stream:
            next(stream)  # it holds four pages of nine
            registering = threads.submit(braid.register_system, "Rain fell on the roofs of the town. " * 60)
            until(lambda: braid._engine.load().waiting)
            assert context.ask("So?", max_new_tokens=4).token_ids == want
            assert braid._engine.load().waiting == 1
            assert not registering.done()
            assert not stream._request or not stream._request.ended, "there was room for the registration all along"
        registering.result(WAIT_S)


def test_a_repetition_penalty_counts_what_was_said_in_the_answer(context: Context) -> None:
    once = context.ask("Well?", max_new_tokens=16, repetition_penalty=1e6)
    assert len(set(once.token_ids)) == 16
    assert not set(once.token_ids) & set(once.prompt_ids)


# one fails, the others do not


def submitted(context: Context, question: str = "Well?", **options: Any) -> Request:
    return context._engine.submit(context.request(question, None, None, options))


@pytest.mark.parametrize("tokens", [0, 1, 5], ids=["at its prefill", "at its second token", "at its sixth token"])
def test_a_pass_that_fails_for_one_request_fails_that_one_alone(
    random_braid: Braid, context: Context, passes: Any, tokens: int, settled: Callable[[Braid], None]
) -> None:
    options: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}]
    alone = [context.ask("Well?", max_new_tokens=12, **each).token_ids for each in options]
    loop = random_braid._engine._loop
    victims: list[Request] = []

    def fail(batch: Batch) -> None:
        for victim in victims:
            held = loop.residency._held.get(victim)
            if held and len(victim.tokens) >= tokens:
                for each in batch.requests:
                    if torch.equal(each.segments[-1].pages, held.pages):
                        raise RuntimeError("no memory for this one")

    def start(batch: Batch) -> None:
        passes.before = fail

    gate = threading.Event()
    passes.before = lambda batch: (gate.wait(WAIT_S), start(batch), fail(batch))
    others = [submitted(context, max_new_tokens=12, **each) for each in options[:2]]
    victims.append(submitted(context, "Anything else?", max_new_tokens=12))
    others.append(submitted(context, max_new_tokens=12, **options[2]))
    gate.set()
    with pytest.raises(RuntimeError, match="no memory for this one"):
        victims[0].result()
    for other in others:
        other.result()
    assert [tuple(other.tokens) for other in others] == alone
    assert (victims[0].state, len(victims[0].tokens)) == (State.FAILED, tokens)
    settled(random_braid)
    assert context.ask("Well?", max_new_tokens=12).token_ids == alone[0]


# a stream is dropped in the middle of a step


class Faults:
    """Does something once, at one point of one step."""

    def __init__(self, point: str, step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = False
        self._point, self._left, self._act = point, step, act
        launch, take = EagerRunner.launch, Done.take

        def launching(runner: EagerRunner, pieces: Sequence[Piece], rows: Sequence[Row]) -> Done:
            self._at("before launch")
            results = launch(runner, pieces, rows)
            self._at("after launch")
            return results

        def taking(results: Done) -> list[Chosen]:
            self._at("in take")
            return take(results)

        monkeypatch.setattr(EagerRunner, "launch", launching)
        monkeypatch.setattr(Done, "take", taking)

    def _at(self, point: str) -> None:
        if point == self._point and not self.done:
            self._left -= 1
            if self._left < 0:
                self.done = True
                self._act()


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("point", ["before launch", "after launch", "in take"])
@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_a_stream_that_goes_at_any_point_of_a_step_leaves_the_others_as_they_are(
    how: str,
    point: str,
    step: int,
    random_braid: Braid,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    settled: Callable[[Braid], None],
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    alone = context.ask("And you?", **options).token_ids
    streams = [context.stream("Well?", max_new_tokens=1000)]
    next(streams[0])
    request = streams[0]._request
    assert request

    def act() -> None:
        assert threading.current_thread().name == "braid-engine"
        if how == "closed":
            streams[0].close()
        else:
            streams.clear()
            gc.collect()

    faults = Faults(point, step, act, monkeypatch)
    assert context.ask("And you?", **options).token_ids == alone
    assert faults.done
    settled(random_braid)
    assert request.state is State.CANCELLED
    assert len(request.tokens) < 1000
