"""What graphs read and write between replays, on any machine: recorded passes run again instead of being replayed.

Kernels are interpreted. On a GPU see test_gpu.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from braidsdk import Braid, Context, graphs
from braidsdk.graphs import GraphDecoder, Graphs
from braidsdk.kernels.paths import TORCH, Paths

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the real ones are tested"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows without a request hold anything
]


INTERPRETED = Paths(attention="triton")
"""What reads the graphs' tables; other operations are quicker by torch."""


class NowPending:
    """`graphs._Pending` where results are there at once; as they were then."""

    def __init__(self, rows: list, chosen: torch.Tensor) -> None:
        self.rows, self.chosen = list(rows), chosen.tolist()

    def take(self) -> None:
        for row, token, finite in zip(self.rows, *self.chosen, strict=False):
            row.take(token, bool(finite))


@pytest.fixture
def braid(make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Braid]:
    """A small one on "graphs"."""

    def record(run: Callable[[], None], *_: object) -> SimpleNamespace:
        run()
        return SimpleNamespace(replay=run)

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graphs, "_Pending", NowPending)
    monkeypatch.setattr(graphs, "QUESTION_ROWS", (8, 12))
    monkeypatch.setattr(graphs, "DECODE_ROWS", (1, 4))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    folder = make_checkpoint(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    with Braid(folder, store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        engine = braid._engine
        engine.model.paths = INTERPRETED
        engine._graphs = Graphs(engine.model, engine.pool)
        yield braid


@pytest.fixture
def contexts(braid: Braid) -> list[Context]:
    rules, *docs = (braid.register(text) for text in ("Be short.", "One document.", "Another " * 20))
    return [braid.compose([rules, *some]) for some in (docs, docs[1:], docs[:1])]


def eagerly(braid: Braid, ask: Callable[[], list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """What `ask` gives without graphs, by torch's operations."""
    engine = braid._engine
    kept, engine._graphs, engine.model.paths = engine._graphs, None, TORCH
    try:
        return ask()
    finally:
        engine._graphs, engine.model.paths = kept, INTERPRETED


def test_answers_are_those_of_single_passes(braid: Braid, contexts: list[Context]) -> None:
    def ask() -> list[tuple[int, ...]]:
        return [
            contexts[0].ask("Well?", max_new_tokens=5).token_ids,
            contexts[1].ask("Well", max_new_tokens=4, repetition_penalty=0.2).token_ids,
            contexts[2].ask("Well? " * 9, max_new_tokens=3, repetition_penalty=0.2).token_ids,
        ]

    assert isinstance(braid._engine.decoder(), GraphDecoder)
    answers = ask()
    assert answers == eagerly(braid, ask)
    assert answers[1] != contexts[1].ask("Well", max_new_tokens=4).token_ids, "the penalty matters"


def test_requests_of_a_batch_choose_as_they_would_alone(braid: Braid, contexts: list[Context]) -> None:
    ways = [{"repetition_penalty": 0.2}, {"temperature": 2.0, "seed": 7}, {}]
    alone = [
        context.ask("Well?", max_new_tokens=4 + at, **way).token_ids
        for at, (context, way) in enumerate(zip(contexts, ways, strict=True))
    ]
    engine = braid._engine
    with engine.calls:
        with engine.working():
            decoder = engine.decoder()
        streams = [
            context.open_stream("Well?", {"max_new_tokens": 4 + at, **way}, started=0.0, decoder=decoder)
            for at, (context, way) in enumerate(zip(contexts, ways, strict=True))
        ]
        running = list(streams)
        while running:
            running = [stream for stream in running if stream.step() is not None]
    assert [stream.answer.token_ids for stream in streams] == alone
    again = contexts[1].ask("Well?", max_new_tokens=5, temperature=2.0, seed=7).token_ids
    assert again == alone[1]
    assert contexts[1].ask("Well?", max_new_tokens=5, temperature=2.0, seed=8).token_ids != again


def test_streams_that_take_turns_do_not_disturb_each_other(braid: Braid, contexts: list[Context]) -> None:
    ways = [{"repetition_penalty": 0.2}, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.2}]
    alone = [
        context.ask("Well?", max_new_tokens=5, **way).token_ids for context, way in zip(contexts, ways, strict=False)
    ]
    streams = [context.stream("Well?", max_new_tokens=5, **way) for context, way in zip(contexts, ways, strict=False)]
    running = list(streams)
    while running:
        running = [stream for stream in running if stream.step() is not None]
    assert [stream.answer.token_ids for stream in streams] == alone
