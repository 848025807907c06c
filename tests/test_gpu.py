"""The whole engine on a GPU, on Triton's kernels and CUDA graphs, against the CPU and against itself."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from braidsdk import Braid, Context, Stream
from braidsdk.engine.batch import Run, forward
from braidsdk.engine.graph_runner import GraphRunner
from braidsdk.engine.graphs import workspace_bytes
from braidsdk.engine.runner import EagerRunner
from braidsdk.errors import InputError, PoolFullError
from braidsdk.models.tiny.evaluate import held_out_sample

pytestmark = pytest.mark.gpu

TEXTS = [
    "The capital of Aistonia is Flubarg.",
    "The capital of Belmora is Plonk.",
    "The capital of Falkirra is Jassik. The river of Falkirra is the Droune.",
]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Braid]]:
    """Open Braids on braid-tiny; on CUDA they must run on Triton."""
    made = []

    def open_(device: str, dtype: str = "float32", **options: object) -> Braid:
        kernels = "triton" if device == "cuda" else None
        store = tmp_path / f"{device}-{dtype}"
        made.append(
            Braid("braid-tiny", **{"store": store, "device": device, "dtype": dtype, "kernels": kernels, **options})
        )
        return made[-1]

    yield open_
    for braid in made:
        braid.close()


@pytest.fixture
def contexts(opened: Callable[..., Braid]) -> list[Context]:
    braid = opened("cuda", "bfloat16")
    rules = braid.register_system("Answer from the documents.")
    docs = braid.register_many(TEXTS, anchor=rules)
    orders = ([0, 1, 2], [2, 0], [1], [2, 1, 0, 2], [])
    return [braid.compose([rules, *(docs[i] for i in order)]) for order in orders]


@pytest.mark.parametrize("mode", ["exact", "isolated", "anchored"])
def test_greedy_answers_are_those_of_the_cpu(opened: Callable[..., Braid], mode: str) -> None:
    """In float32 all of 200; in bfloat16 the first token, where two are not closer than the two devices are."""
    samples = [held_out_sample(2 + number % 3, "mixed", number) for number in range(200)]
    texts = sorted({text for sample in samples for text in sample.documents if text})
    systems = sorted({sample.system for sample in samples if sample.system})

    def ready(braid: Braid) -> list[tuple[Context, str]]:
        rules = {text: braid.register_system(text) for text in systems}
        docs = dict(zip(texts, braid.register_many(texts, progress=False), strict=True))
        made = []
        for sample in samples:
            chunks = [rules[sample.system]] if sample.system else []
            chunks += [docs[text] for text in sample.documents if text]
            made.append((braid.compose(chunks, mode=mode, keep=False), sample.questions[0].text))
        return made

    cpu, cuda = (opened(device, "float32") for device in ("cpu", "cuda"))
    answers = [braid.ask_many(ready(braid), max_new_tokens=8) for braid in (cpu, cuda)]
    assert [each.token_ids for each in answers[0]] == [each.token_ids for each in answers[1]]

    firsts = []
    for device in ("cpu", "cuda"):
        requests = ready(opened(device, "bfloat16"))[:60]
        firsts.append(torch.stack([context.next_token_logits(question) for context, question in requests]))
    error = (firsts[0] - firsts[1]).abs().max()
    best = firsts[0].topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * error
    assert clear.float().mean() > 0.5
    assert torch.equal(firsts[0].argmax(-1)[clear], firsts[1].argmax(-1)[clear])


def switch(braid: Braid, runner: object) -> object:
    """Let a Braid run on another runner; returns the one before."""
    loop = braid._engine._loop
    before = loop.runner
    braid._engine.call(lambda: setattr(loop, "runner", runner))
    return before


def test_graphs_give_what_single_passes_give(opened: Callable[..., Braid]) -> None:
    braid = opened("cuda", "bfloat16")
    rules = braid.register_system("Answer from the documents.")
    docs = braid.register_many(TEXTS, anchor=rules)
    context = braid.compose([rules, *docs])
    loop = braid._engine._loop
    assert isinstance(loop.runner, GraphRunner)
    for question in ("Well?", "What is the capital of Belmora? " * 5, "Who? " * 40):
        graphed = context.ask(question, max_new_tokens=40).token_ids
        assert graphed == context.ask(question, max_new_tokens=40).token_ids
        graphs = switch(braid, EagerRunner(loop.model, loop.pool))
        eager = context.ask(question, max_new_tokens=40).token_ids
        switch(braid, graphs)
        assert graphed == eager


def test_many_requests_and_threads_share_the_graphs(opened: Callable[..., Braid], contexts: list[Context]) -> None:
    braid = opened("cuda", "float32")
    rules = braid.register_system("Answer from the documents.")
    docs = braid.register_many(TEXTS, anchor=rules)
    contexts = [braid.compose([rules, *(docs[i] for i in order)]) for order in ([0, 1, 2], [2, 0], [1], [2, 1, 0, 2])]
    questions = ["What is the capital of Aistonia?", "Which river flows through Falkirra?", "What?"] * 10
    requests = [(contexts[index % 4], question) for index, question in enumerate(questions)]
    alone = [context.ask(question, max_new_tokens=20).token_ids for context, question in requests]
    together = braid.ask_many(requests, max_new_tokens=20)
    assert [answer.token_ids for answer in together] == alone
    sampled = {"temperature": 0.7, "seed": 3, "max_new_tokens": 10}
    assert [answer.token_ids for answer in braid.ask_many(requests[:5], **sampled)] == [
        context.ask(question, **sampled).token_ids for context, question in requests[:5]
    ]
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        stream = requests[index][0].stream(requests[index][1], max_new_tokens=20)
        for _ in stream:
            pass
        results[index] = stream.answer.token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(6)] == alone[:6]


def test_requests_that_choose_differently_go_on_together(contexts: list[Context]) -> None:
    """Greedy, sampled and penalised rows in one batch, ahead of the host: each gives the same answer as alone."""
    ways = [
        {},
        {"temperature": 0.9, "seed": 5},
        {"repetition_penalty": 1.4},
        {"temperature": 1.3, "top_p": 0.9, "seed": 5},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 8},
    ]
    question = "What is the capital of Belmora?"
    alone = [
        context.ask(question, max_new_tokens=16, **way).token_ids for context, way in zip(contexts, ways, strict=True)
    ]
    assert alone == [
        context.ask(question, max_new_tokens=16, **way).token_ids for context, way in zip(contexts, ways, strict=True)
    ]
    streams = [context.stream(question, max_new_tokens=16, **way) for context, way in zip(contexts, ways, strict=True)]
    read_together(streams)
    assert [stream.answer.token_ids for stream in streams] == alone


def read_together(streams: list[Stream]) -> None:
    """Read streams to their ends, each in a thread of its own."""
    readers = [threading.Thread(target=lambda stream=stream: [*stream]) for stream in streams]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


@pytest.mark.parametrize("launch", range(1, 8))
def test_a_stream_dropped_at_any_step_leaves_the_others_alone(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch, launch: int
) -> None:
    want = contexts[1].ask("Well?", max_new_tokens=24).token_ids
    dropped = [contexts[0].stream("Well?", max_new_tokens=24)]
    kept = contexts[1].stream("Well?", max_new_tokens=24)
    runner, launches = contexts[0]._engine._loop.runner, []
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


@pytest.mark.slow
def test_load_on_graphs(contexts: list[Context]) -> None:
    """Threads ask, and close streams at random. Every finished answer is the same as when it is asked alone."""
    want = [context.ask("Well?", max_new_tokens=40).token_ids for context in contexts]
    wrong = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(30):
            at = draw.randrange(len(contexts))
            stream = contexts[at].stream("Well?", max_new_tokens=40)
            ends = draw.randrange(40) if draw.random() < 0.3 else None
            for count, _ in enumerate(stream):
                if count == ends:
                    stream.close()
            if ends is None and stream.answer.token_ids != want[at]:
                wrong.append((seed, at))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    loop = contexts[0]._engine._loop
    contexts[0]._engine.call(loop._integrity)


def test_penalised_answers_are_those_of_the_cpu(opened: Callable[..., Braid]) -> None:
    """The repetition penalty counts prompt and answer on the device too, whatever else is asked in between."""
    answers = []
    for device in ("cpu", "cuda"):
        braid = opened(device)
        context = braid.compose(braid.register_many(TEXTS, progress=False))
        long = "Tell me about Falkirra. " * 12
        streams = [context.stream(text, max_new_tokens=24, repetition_penalty=3.0) for text in ("Well?", long)]
        read_together(streams)
        assert streams[0].answer.token_ids != context.ask("Well?", max_new_tokens=24).token_ids
        answers.append([stream.answer.token_ids for stream in streams])
    assert answers[0] == answers[1]


def test_a_temperature_draws_among_what_may_be_drawn(contexts: list[Context]) -> None:
    greedy = contexts[0].ask("Well?", max_new_tokens=12).token_ids
    assert contexts[0].ask("Well?", max_new_tokens=12, temperature=3.0, top_k=1).token_ids == greedy
    drawn = {contexts[0].ask("Well?", max_new_tokens=12, temperature=3.0, top_k=0, seed=n).token_ids for n in range(8)}
    assert len(drawn) > 4
    unseeded = {contexts[0].ask("Well?", max_new_tokens=12, temperature=3.0, top_k=0).token_ids for _ in range(8)}
    assert len(unseeded) > 4, "without a seed each answer is another one"


def test_after_warming_up_no_question_captures_anything(opened: Callable[..., Braid]) -> None:
    braid = opened("cuda", "bfloat16")
    docs = braid.register_many(TEXTS, progress=False)
    contexts = [braid.compose(docs[:n]) for n in range(3)]
    engine, steps = contexts[0]._engine, []
    free = torch.cuda.mem_get_info()[0]
    braid.warm_up(requests=64, on_progress=lambda done, total: steps.append((done, total)), progress=False)
    assert steps == [(done, steps[0][1]) for done in range(steps[0][1] + 1)]
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] <= workspace_bytes(engine.model), "as much was set aside"
    graphs = engine._loop.runner.graphs
    captured = {**graphs._questions, **graphs._decodings}
    contexts[1].ask("Well?", max_new_tokens=5)
    contexts[2].ask("What is the capital of Belmora? " * 3, max_new_tokens=5, temperature=1.0)
    assert {**graphs._questions, **graphs._decodings} == captured
    launches = engine.launches()
    assert launches.keys() >= {"decoding of 1", "decoding of 64, drawn", "question of 32"}
    layers = engine.model.config.layers
    assert not {name: n for name, n in launches.items() if not 5 * layers < n <= 12 * layers + 24}
    assert launches["decoding of 1"] <= 5 * layers + 4


def test_graphs_count_in_the_memory_budget(tmp_path: Path) -> None:
    with Braid("braid-tiny", store=tmp_path, device="cuda", kernels="triton", pool_bytes=2**30) as braid:
        taken = workspace_bytes(braid._engine.model)
        assert 0 <= 2**30 - braid.stats().pool_capacity_bytes - taken < braid._engine.pool.page_bytes
    with pytest.raises(PoolFullError, match="larger pool_bytes"):
        Braid("braid-tiny", store=tmp_path, device="cuda", kernels="triton", pool_bytes=taken)


def test_a_batch_changes_logits_by_no_more_than_rounding(opened: Callable[..., Braid], contexts: list[Context]) -> None:
    """A request's next token alone and among 64. In bfloat16 the two differ only by rounding."""

    def logits(braid: Braid, *, together: bool) -> torch.Tensor:
        engine = braid._engine
        pages = engine.pool.take(64 * 64).view(64, -1)
        ids = [engine.layout.plain_ids(f"{text} {number}") for number, text in enumerate(TEXTS * 22)][:64]
        texts = [Run(tuple(each[:-1]), (), own, 0, 0) for each, own in zip(ids, pages, strict=True)]
        steps = [Run((each[-1],), (), own, len(each) - 1, 0) for each, own in zip(ids, pages, strict=True)]

        def compute() -> torch.Tensor:
            forward(engine.model, engine.pool, texts)
            parts = [steps] if together else [[step] for step in steps]
            found = [forward(engine.model, engine.pool, part, [True] * len(part)) for part in parts]
            engine.pool.give_back(pages.flatten())
            return torch.cat(found).double().cpu()

        return engine.call(compute)

    exact = logits(opened("cuda", "float32"), together=True)
    half = opened("cuda", "bfloat16")
    alone, together = logits(half, together=False), logits(half, together=True)
    error = (alone - exact).square().mean().sqrt()
    assert (alone - together).square().mean().sqrt() <= 1.5 * error
    assert (together - exact).square().mean().sqrt() <= 1.5 * error


def test_ten_thousand_requests_take_no_more_memory_than_a_hundred(contexts: list[Context]) -> None:
    engine = contexts[0]._engine
    for index in range(100):
        contexts[index % 5].ask("Well?", max_new_tokens=2)
    torch.cuda.synchronize()
    before, free, turns = torch.cuda.memory_allocated(), len(engine.pool._free), len(engine.pool._entries)
    for index in range(9_900):
        contexts[index % 5].ask("Well?", max_new_tokens=2)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert (len(engine.pool._free), len(engine.pool._entries)) == (free, turns)


def test_a_conversation_goes_on_from_its_resident_turn(contexts: list[Context]) -> None:
    first = contexts[0].ask("What is the capital of Aistonia?", max_new_tokens=12)
    history = [
        {"role": "user", "content": "What is the capital of Aistonia?"},
        {"role": "assistant", "content": first.text},
    ]
    second = contexts[0].ask("And of Belmora?", history=history, max_new_tokens=12)
    assert second.usage.computed_tokens < 40
    assert second.usage.cached_tokens > first.usage.prompt_tokens


REPAIRS = ["guided(0.3)", "linked(8)", "blended(0.3)", "guided(0.3)+shift", "linked(8)+shift"]


def repaired_contexts(braid: Braid, modes: list[str]) -> list[Context]:
    rules = braid.register_system("Answer from the documents.")
    docs = braid.register_many(TEXTS, anchor=rules)
    return [braid.compose([rules, *docs], mode=mode) for mode in modes]


def test_repairs_on_graphs_are_those_of_torchs_operations(opened: Callable[..., Braid], tmp_path: Path) -> None:
    """In float32 the same answers, the next token's logits to rounding; in bfloat16 no further from float32's."""
    question, modes = "What is the capital of Belmora?", [*REPAIRS, "anchored", "exact"]
    answers, logits = [], {}
    for kernels, dtype in (("torch", "float32"), ("triton", "float32"), ("torch", "bfloat16"), ("triton", "bfloat16")):
        own = {"kernels": kernels, "store": tmp_path / f"{kernels}-{dtype}", "pool_bytes": 2**30}
        contexts = repaired_contexts(opened("cuda", dtype, **own), modes)
        if dtype == "float32":
            answers.append([context.ask(question, max_new_tokens=16, stop_ids=[]).token_ids for context in contexts])
        found = torch.stack([context.next_token_logits(question) for context in contexts])
        logits[kernels, dtype] = found
    exact = logits["torch", "float32"]
    assert answers[0] == answers[1]
    torch.testing.assert_close(logits["triton", "float32"], exact, rtol=0, atol=1e-3)  # sums in another order
    moved = (exact[:-2] - exact[-2]).norm(dim=1)
    assert (moved > 20 * (logits["triton", "float32"] - exact).norm(dim=1)[:-2]).all(), "repairs matter"
    # The rules choose by scores that are rounded too, so only what `linked` chooses is the same for sure.
    fixed = [at for at, mode in enumerate(modes) if mode.startswith(("linked", "anchored", "exact"))]
    theirs, ours = ((logits[kernels, "bfloat16"] - exact)[fixed].norm() for kernels in ("torch", "triton"))
    assert ours <= 1.5 * theirs


def test_rows_decode_together_with_and_without_repairs(opened: Callable[..., Braid]) -> None:
    """Each as it does alone, in captured passes that are there already."""
    braid = opened("cuda", "float32")
    contexts = repaired_contexts(braid, [*REPAIRS, "anchored", "exact"])
    questions = ["What is the capital of Aistonia?", "Which river flows through Falkirra?", "What?"]
    asked = [(context, question) for question in questions for context in contexts]
    braid.warm_up(requests=len(asked), progress=False)
    graphs = braid._engine._loop.runner.graphs
    captured = {**graphs._questions, **graphs._decodings}
    alone = [context.ask(question, max_new_tokens=20, stop_ids=[]).token_ids for context, question in asked]
    for _ in range(2):
        together = braid.ask_many(asked, max_new_tokens=20, stop_ids=[])
        assert [answer.token_ids for answer in together] == alone
    streams = [context.stream(question, max_new_tokens=20, stop_ids=[]) for context, question in asked]
    read_together(streams)
    assert [stream.answer.token_ids for stream in streams] == alone
    assert {**graphs._questions, **graphs._decodings} == captured
    braid._engine.call(braid._engine._loop._integrity)


def test_what_triton_can_not_compute_is_refused_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float64"):
        Braid("braid-tiny", store=tmp_path, device="cuda", dtype="float64", kernels="triton")
