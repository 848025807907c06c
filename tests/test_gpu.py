"""The whole engine on a GPU, on Triton's kernels and CUDA graphs, against the CPU and against itself."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from braidsdk import Braid, Context
from braidsdk.decoding import EagerDecoder
from braidsdk.errors import InputError
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


def test_graphs_give_what_single_passes_give(contexts: list[Context]) -> None:
    engine = contexts[0]._engine
    for length, context in zip(("Well?", "What is the capital of Belmora? " * 5, "Who? " * 40), contexts, strict=False):
        graphed = context.ask(length, max_new_tokens=40).token_ids
        again = context.ask(length, max_new_tokens=40).token_ids
        assert graphed == again
        graphs, engine._graphs = engine._graphs, None
        assert isinstance(engine.decoder(), EagerDecoder)
        eager = context.ask(length, max_new_tokens=40).token_ids
        engine._graphs = graphs
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


def test_what_triton_can_not_compute_is_refused_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float64"):
        Braid("braid-tiny", store=tmp_path, device="cuda", dtype="float64", kernels="triton")
