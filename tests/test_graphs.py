"""What graphs read and write between replays, on any machine: recorded passes run again instead of being replayed.

Kernels are interpreted. On a GPU see test_gpu.py.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch

from braidsdk import Braid, Context
from braidsdk.cache import pool
from braidsdk.engine import graph_runner, graphs
from braidsdk.engine import runner as eager_runner
from braidsdk.engine.graph_runner import GraphRunner
from braidsdk.engine.runner import Chosen, EagerRunner, Piece, Runner
from braidsdk.kernels.attention.live_tables import LiveRoom
from braidsdk.kernels.attention.static import Room
from braidsdk.kernels.backends import Backends

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the real ones are tested"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows without a request hold anything
]


INTERPRETED = Backends(attention="triton")
"""What reads the graphs' tables; other operations are quicker by torch."""


ANGLES = (torch.zeros(1, 1), torch.zeros(1, 1))

T = TypeVar("T")


class NowPending:
    """`graph_runner._Pending` where results are there at once; as they were then."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.chosen: list[Chosen] = []

    def add(self, chosen: torch.Tensor, rows: list) -> None:
        ids, finite = chosen.tolist()
        self.chosen += [Chosen(row, ids[column], bool(finite[column])) for row, column in rows]

    def take(self) -> list[Chosen]:
        return self.chosen


@pytest.fixture
def braid(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Braid]:
    """A small one on "graphs", of one layer unless a test wants more."""

    def record(run: Callable[[], None], *_: object) -> SimpleNamespace:
        run()
        return SimpleNamespace(replay=run)

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graph_runner, "_Pending", NowPending)
    monkeypatch.setattr(graphs, "QUESTION_ROWS", (8, 12))
    monkeypatch.setattr(graphs, "TOGETHER_ROWS", (16, 40))
    monkeypatch.setattr(graphs, "TOGETHER", 3)
    monkeypatch.setattr(graphs, "DECODE_ROWS", (1, 4, 16))
    monkeypatch.setitem(pool.PAGE_SIZE, "cpu", pool.PAGE_SIZE["cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    layers = getattr(request, "param", 1)
    folder = make_checkpoint(num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1)
    with Braid(folder, store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        loop, model = braid._engine._loop, braid._engine.model

        def switch() -> None:
            model.backends = INTERPRETED
            loop.runner = GraphRunner(model, loop.pool)

        braid._engine.call(switch)
        yield braid


@pytest.fixture
def contexts(braid: Braid) -> list[Context]:
    rules, *docs = (braid.register(text) for text in ("Be short.", "One document.", "Another " * 20))
    return [braid.compose([rules, *some]) for some in (docs, docs[1:], docs[:1])]


def eagerly(braid: Braid, ask: Callable[[], list[T]]) -> list[T]:
    """What `ask` gives without graphs, by torch's operations."""
    loop, model = braid._engine._loop, braid._engine.model
    kept = loop.runner

    def switch(runner: Runner, backends: Backends) -> None:
        model.backends, loop.runner = backends, runner

    braid._engine.call(lambda: switch(EagerRunner(model, loop.pool), Backends()))
    try:
        return ask()
    finally:
        braid._engine.call(lambda: switch(kept, INTERPRETED))


def test_sources_are_those_of_single_passes(braid: Braid, contexts: list[Context]) -> None:
    """Triton's log-sum-exp of each segment, after an answer whose last step was launched ahead."""
    asked = [(contexts[0], "Well?"), (contexts[1], "Well"), (contexts[0], "Why?")]
    shares: list[list[float]] = []

    def ask() -> list[tuple[int, ...]]:
        answers = braid.ask_many(asked, max_new_tokens=4, sources=True)
        shares.append([share for answer in answers for token in answer.token_sources or () for share in token.shares])
        return [answer.token_ids for answer in answers]

    assert ask() == eagerly(braid, ask)
    assert len(shares[0]) == (3 + 2 + 3) * 4
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)  # float32, summed in another order


def test_answers_are_those_of_single_passes(braid: Braid, contexts: list[Context]) -> None:
    def ask() -> list[tuple[int, ...]]:
        return [
            contexts[0].ask("Well?", max_new_tokens=5).token_ids,
            contexts[1].ask("Well", max_new_tokens=4, repetition_penalty=0.2).token_ids,
            contexts[2].ask("Well? " * 9, max_new_tokens=3, repetition_penalty=0.2).token_ids,
        ]

    answers = ask()
    assert answers == eagerly(braid, ask)
    assert answers[1] != contexts[1].ask("Well", max_new_tokens=4).token_ids, "the penalty matters"


TWO_LAYERS = pytest.mark.parametrize("braid", [2], indirect=True)
"""Keys of the first layer are the same after any repair."""

DRAWN = {"temperature": 1.0, "seed": 3}
"""So that what is chosen depends on all that is seen."""

REPAIRS = ("guided(0.4)", "linked(5)+shift", "blended(0.5)", "guided(0.5)+shift")


def composed(braid: Braid, *modes: str) -> list[Context]:
    rules = braid.register_system("Be short.")
    docs = braid.register_many(["One document.", "Another. " * 9, "The last one."], anchor=rules, progress=False)
    return [braid.compose([rules, *docs], mode=mode) for mode in modes]


@TWO_LAYERS
def test_repaired_answers_are_those_of_single_passes(braid: Braid) -> None:
    """Alone, and beside rows that are repaired otherwise or not at all; attention to sources too."""
    contexts = composed(braid, *REPAIRS, "anchored")
    shares: list[list[float]] = []

    def ask() -> list[tuple[int, ...]]:
        alone = [context.ask("Well?", max_new_tokens=7, **DRAWN).token_ids for context in contexts[1:4:2]]
        asked = [(context, "Well?") for context in contexts]
        together = braid.ask_many(asked, max_new_tokens=7, sources=True, **DRAWN)
        shares.append([share for answer in together for token in answer.token_sources or () for share in token.shares])
        return [*alone, *(answer.token_ids for answer in together)]

    answers = ask()
    assert answers == eagerly(braid, ask)
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)  # float32, summed in another order
    assert answers[:2] == answers[3:6:2]
    assert len(set(answers)) > 2, "repairs matter"
    braid._engine.call(braid._engine._loop._integrity)


@TWO_LAYERS
@pytest.mark.parametrize(
    "modes",
    [
        ["guided(0.5)+shift"],
        ["linked(5)+shift", "guided(0.4)", "linked(8)+shift"],
        ["linked(3)"],  # few enough for a graph
        ["linked(2)", "guided(0.1)", "linked(3)"],
    ],
)
def test_logits_of_repaired_rows_are_those_of_single_passes(
    braid: Braid, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row, and of several that decode together: after the question, and after each of three tokens."""
    asked = [(context, "Well?") for context in composed(braid, *modes)]
    seen: list[torch.Tensor] = []

    def noting(honest: Callable[..., T]) -> Callable[..., T]:
        def noted(logits: torch.Tensor, *rest: object) -> T:
            seen.append(logits[: len(asked)].clone())
            return honest(logits, *rest)

        return noted

    def ask() -> list[torch.Tensor]:
        seen.clear()
        braid.ask_many(asked, max_new_tokens=4)
        return seen[:4]

    honest = GraphRunner._compute

    def compute(runner: GraphRunner, pieces: Sequence[Piece]) -> torch.Tensor:
        before, chosen = len(seen), honest(runner, pieces)
        if not pieces[0].row:  # a repair: its graph chooses a token that nobody wants
            del seen[before:]
        return chosen

    monkeypatch.setattr(GraphRunner, "_compute", compute)
    ask()  # passes are recorded
    monkeypatch.setattr(graphs, "choose_into", noting(graphs.choose_into))
    monkeypatch.setattr(eager_runner, "choose", noting(eager_runner.choose))
    for one, other in zip(ask(), eagerly(braid, ask), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # float32 sums in another order


@TWO_LAYERS
@pytest.mark.parametrize("mode", ["guided(0.6)", "guided(0.6)+shift"])
def test_repairs_beside_rows_that_decode(braid: Braid, mode: str) -> None:
    """A repair and the question behind it come in pieces, some of them in one step."""
    repaired, plain = composed(braid, mode, "anchored")
    question = "Well then, what is it? " * 3
    braid._engine._loop.scheduler._piece_tokens = 10

    def ask() -> list[tuple[int, ...]]:
        with plain.stream("Well?", max_new_tokens=60) as pieces:
            next(pieces)
            return [repaired.ask(question, max_new_tokens=6, **DRAWN).token_ids]

    answers = ask()
    assert answers == eagerly(braid, ask)
    assert answers != [plain.ask(question, max_new_tokens=6, **DRAWN).token_ids]


@TWO_LAYERS
def test_no_request_with_repairs_records_a_pass(braid: Braid, monkeypatch: pytest.MonkeyPatch) -> None:
    """After warming up, which takes those of one request that is repaired, and of one that is not."""
    plain, *repaired = composed(braid, "anchored", *REPAIRS[:2])
    for context in (plain, repaired[0]):
        braid.ask_many([(context, "Well?")] * 3, max_new_tokens=3)
        context.ask("Well?", max_new_tokens=3)
    monkeypatch.setattr(graphs, "_record", None)
    braid.ask_many([(context, "Well?") for context in (*repaired, plain)], max_new_tokens=3)
    repaired[1].ask("Well?", max_new_tokens=3)


def test_logits_along_an_answer_are_those_of_single_passes(braid: Braid, contexts: list[Context]) -> None:
    def given() -> list[torch.Tensor]:
        with contexts[0].stream("Well?", max_new_tokens=40) as pieces:  # a row decodes beside them
            next(pieces)
            return [contexts[0].answer_logits("Well?", (3, 900, 17)), contexts[1].next_token_logits("Well")]

    for one, other in zip(given(), eagerly(braid, given), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # float32 sums in another order


WAYS = [
    {"repetition_penalty": 0.2},
    {"temperature": 2.0, "seed": 7},
    {},
    {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.2},
]


def test_requests_of_a_batch_choose_as_they_would_alone(braid: Braid, contexts: list[Context]) -> None:
    """Rows join and leave while others decode, and each gives the same answer as alone."""
    asked = [(contexts[at % 3], {"max_new_tokens": 3 + at % 5, **WAYS[at % 4]}) for at in range(9)]
    alone = [context.ask("Well?", **way).token_ids for context, way in asked]
    streams = [context.stream("Well?", **way) for context, way in asked]
    held = threading.Event()
    holding = threading.Thread(target=braid._engine.call, args=(held.wait,))
    holding.start()
    readers = [threading.Thread(target=lambda stream=stream: [*stream]) for stream in streams]
    for reader in readers:
        reader.start()
    held.set()
    for thread in (holding, *readers):
        thread.join()
    assert [stream.answer.token_ids for stream in streams] == alone
    assert contexts[1].ask("Well?", max_new_tokens=4, temperature=2.0, seed=8).token_ids != alone[1]


@pytest.mark.parametrize("launch", range(1, 7))
def test_a_stream_dropped_at_any_step_leaves_the_others_alone(
    braid: Braid, contexts: list[Context], monkeypatch: pytest.MonkeyPatch, launch: int
) -> None:
    want = contexts[1].ask("Well?", max_new_tokens=12, repetition_penalty=0.2).token_ids
    dropped = [contexts[0].stream("Well?", max_new_tokens=12)]
    kept = contexts[1].stream("Well?", max_new_tokens=12, repetition_penalty=0.2)
    runner, launches = braid._engine._loop.runner, []
    honest = runner.launch

    def launching(*given: object) -> object:
        launches.append(1)
        if len(launches) == launch:
            dropped.clear()
        return honest(*given)

    monkeypatch.setattr(runner, "launch", launching)
    other = threading.Thread(target=lambda: next(dropped[0], None))
    other.start()
    list(kept)
    other.join()
    assert kept.answer.token_ids == want
    assert not dropped or len(launches) < launch
    braid._engine.call(braid._engine._loop._integrity)


def test_a_pass_recorded_while_rows_run_changes_nothing(braid: Braid, contexts: list[Context]) -> None:
    """It has fewer rows than run, and no memory for what these see."""
    want = [context.ask("Well?", max_new_tokens=12).token_ids for context in contexts]
    graphs, launches = braid._engine._loop.runner.graphs, []
    honest = graphs._record

    def recording(run: Callable[[], None], what: str) -> object:
        launches.append((what, int(graphs.batch.attention.plan(graphs.batch.state[0], *ANGLES).tables.counts.sum())))
        return honest(run, what)

    graphs._record = recording
    streams = [context.stream("Well?", max_new_tokens=12) for context in contexts]
    first = [next(stream) for stream in streams]
    for rows in (4, 16):
        graphs._decodings.clear()
        braid._engine.call(lambda rows=rows: graphs._decoding(rows, False, False))
    texts = [text + "".join(stream) for text, stream in zip(first, streams, strict=True)]
    assert [stream.answer.token_ids for stream in streams] == want, texts
    assert launches
    assert all(items == 0 for what, items in launches if what != "decoding of 1")


def test_tables_grow_when_more_segments_come_than_ever(braid: Braid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(braid._engine._loop.runner.graphs, "_room", Room(items=2, words=8, partials=2))
    monkeypatch.setattr(graphs, "LiveRoom", partial(LiveRoom, items=2, words=64, partials=2))
    contexts = [braid.compose(braid.register_many([f"Text {n} of {m}." for n in range(m)])) for m in (1, 3, 6)]

    def ask() -> list[tuple[int, ...]]:
        return [a.token_ids for a in braid.ask_many([(c, "Well?") for c in contexts], max_new_tokens=5)]

    assert ask() == eagerly(braid, ask)


def test_a_slot_of_a_sampled_row_is_greedy_for_the_next_one(braid: Braid, contexts: list[Context]) -> None:
    want = contexts[0].ask("Well?", max_new_tokens=6).token_ids
    sampled = contexts[1].stream("Well?", max_new_tokens=60, temperature=2.0, seed=2)
    next(sampled)
    for end in (True, False):
        other = contexts[0].stream("Well?", max_new_tokens=3, temperature=5.0, repetition_penalty=3.0, seed=1)
        next(other)
        if end:
            list(other)
        other.close()
        assert contexts[0].ask("Well?", max_new_tokens=6).token_ids == want
    assert braid.stats().running, "a sampled row runs beside, so the pass samples"
    sampled.close()


@pytest.mark.parametrize(("items", "fails"), [(2, 2), (5, 1), (8, 1)])
def test_a_batch_that_cannot_be_enlarged_goes_on_as_it_was(
    braid: Braid, contexts: list[Context], monkeypatch: pytest.MonkeyPatch, items: int, fails: int
) -> None:
    """Requests of that step fail; those that follow do not."""
    want = [context.ask("Well?", max_new_tokens=6).token_ids for context in contexts]
    made = braid._engine._loop.runner.graphs
    braid._engine.call(lambda: made.enlarge_batch(LiveRoom(items=items)))
    honest, calls = made.enlarge_batch, []

    def enlarge(room: LiveRoom) -> None:
        calls.append(room)
        if len(calls) == fails:
            raise MemoryError("no room")
        honest(room)

    monkeypatch.setattr(made, "enlarge_batch", enlarge)
    streams = [context.stream("Well?", max_new_tokens=6) for context in contexts]
    for stream in streams:
        with suppress(MemoryError):
            next(stream)
    for stream in streams:
        with suppress(MemoryError):
            list(stream)
    answers = braid.ask_many([(context, "Well?") for context in contexts], max_new_tokens=6)
    assert [answer.token_ids for answer in answers] == want


def test_a_pass_that_cannot_be_recorded_leaves_running_rows_alone(braid: Braid, contexts: list[Context]) -> None:
    want = [context.ask("Well?", max_new_tokens=12).token_ids for context in contexts[:2]]
    streams = [context.stream("Well?", max_new_tokens=12) for context in contexts[:2]]
    for stream in streams:
        next(stream)
    made = braid._engine._loop.runner.graphs
    honest = made._record

    def record(run: Callable[[], None], what: str) -> SimpleNamespace:
        honest(run, what)
        raise MemoryError("no room")

    def fail() -> None:
        made._record = record
        made._decodings.pop((16, False, False), None)
        try:
            made._decoding(16, False, False)
        finally:
            made._record = honest

    with pytest.raises(MemoryError):
        braid._engine.call(fail)
    for stream in streams:
        list(stream)
    assert [stream.answer.token_ids for stream in streams] == want
