"""Where an answer came from: shares of attention against transformers' weights, and that asking for them changes
nothing else."""

import asyncio
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from braidsdk import Answer, Braid, Chunk, Context
from braidsdk.cache.pool import Pool
from braidsdk.engine import attribution
from braidsdk.engine.attribution import layers_of
from braidsdk.errors import BraidError, InputError
from braidsdk.kernels import native
from braidsdk.models.decoder import Decoder
from braidsdk.models.tiny.evaluate import held_out_sample
from braidsdk.testing import FakeBraid

PoolOf = Callable[[Braid], Pool]

TOLERANCE = 1e-5
"""Of a share. float32 sums in another order, through a few layers; we have seen 5e-7."""

TEXTS = ["Rivers run to the sea. " * 9, "Mountains stay where they are.", "Clouds come and go, and some rain. " * 5]
NAMES = ["rivers", "mountains", "clouds"]


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def checkpoint(
    request: pytest.FixtureRequest, save_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of so many layers that several are looked at."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), family=request.param, num_hidden_layers=8)


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> PreTrainedModel:
    return eager(checkpoint)


@pytest.fixture(scope="module")
def braid(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Braid]:
    with Braid(checkpoint, store=tmp_path_factory.mktemp("store"), device="cpu", dtype="float32") as opened:
        yield opened


def eager(checkpoint: Path) -> PreTrainedModel:
    """transformers' model, which shows its weights."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def documents(random_braid: Braid) -> list[Chunk]:
    """An anchor, and three documents."""
    rules = random_braid.register_system("Answer.")
    return [rules, *random_braid.register_many(TEXTS, names=NAMES, anchor=rules)]


@pytest.fixture
def context(random_braid: Braid, documents: list[Chunk]) -> Context:
    return random_braid.compose(documents)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass that looked at sources."""
    seen: list[int] = []
    honest = Decoder.attention_shares

    def counted(self: Decoder, batch, kv, layers):
        seen.append(len(batch.token_ids))
        return honest(self, batch, kv, layers)

    monkeypatch.setattr(Decoder, "attention_shares", counted)
    return seen


@torch.inference_mode()
def by_hand(peer: PreTrainedModel, answer: Answer, context: Context) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Shares by chunk, of the answer and of each token, from the weights of a full prefill."""
    ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids[:-1]]])
    layers = layers_of(peer.config.num_hidden_layers)
    weights = peer(ids, output_attentions=True).attentions
    rows = torch.stack([weights[layer][0, :, len(answer.prompt_ids) - 1 :] for layer in layers]).double().sum((0, 1))
    mass: dict[str, torch.Tensor] = {}
    for chunk in context.explain().chunks:
        if chunk.chunk_id and chunk.label != "rules":
            one = rows[:, chunk.position : chunk.position + chunk.tokens].sum(-1)
            mass[chunk.label] = mass.get(chunk.label, torch.zeros(())) + one
    everything = torch.stack(list(mass.values())).sum(0)
    tokens = [{name: float(one[at] / everything[at]) for name, one in mass.items()} for at in range(len(rows))]
    return {name: float(one.sum() / everything.sum()) for name, one in mass.items()}, tokens


def by_name(answer: Answer) -> tuple[dict[str, float], list[dict[str, float]]]:
    assert answer.sources is not None
    assert answer.token_sources is not None
    names = [source.chunk.label for source in answer.sources]
    tokens = [dict(zip(names, token.shares, strict=True)) for token in answer.token_sources]
    return {source.chunk.label: source.share for source in answer.sources}, tokens


def check(answer: Answer, want: tuple[dict[str, float], list[dict[str, float]]], tolerance: float = TOLERANCE) -> None:
    """Shares are these, add up to 1 and are ranked, and there is a row for each token."""
    whole, tokens = by_name(answer)
    assert whole == pytest.approx(want[0], abs=tolerance)
    assert len(tokens) == len(want[1]) == len(answer.token_ids)
    for mine, theirs in zip(tokens, want[1], strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance)
        assert sum(mine.values()) == pytest.approx(1)
    assert sum(whole.values()) == pytest.approx(1)
    assert list(whole.values()) == sorted(whole.values(), reverse=True)


def same(answer: Answer, other: Answer, tolerance: float = TOLERANCE) -> None:
    """Both answers are the same, and come from the same."""
    assert (answer.token_ids, answer.text) == (other.token_ids, other.text)
    check(answer, by_name(other), tolerance)


# what is computed


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1, 2, 1, 0)], ids=["in order", "two of them", "one twice"])
@pytest.mark.parametrize("question", ["Which?", "Which of them is it, and why? " * 12], ids=["short", "long"])
def test_shares_are_those_of_transformers_weights(
    braid: Braid, peer: PreTrainedModel, order: tuple[int, ...], question: str
) -> None:
    rules = braid.register_system("Answer.", name="rules", replace=True)
    docs = braid.register_many(TEXTS, names=NAMES, replace=True)
    context = braid.compose([rules, *(docs[at] for at in order)], mode="exact")
    answer = context.ask(question, max_new_tokens=20, sources=True)
    check(answer, by_hand(peer, answer, context))


def test_without_a_system_prompt_the_header_is_no_document(braid: Braid, peer: PreTrainedModel) -> None:
    context = braid.compose(braid.register_many(TEXTS, names=NAMES, replace=True), mode="exact")
    answer = context.ask("Which?", max_new_tokens=3, sources=True)
    check(answer, by_hand(peer, answer, context))


def test_braid_tiny_too(tiny: Braid, tiny_checkpoint: Path) -> None:
    rules = tiny.register_system("You answer questions from the documents.", name="rules")
    texts = ["The capital of Aistonia is Flubarg.", "The capital of Belmora is Plonk."]
    context = tiny.compose([rules, *tiny.register_many(texts, names=["aistonia", "belmora"])], mode="exact")
    answer = context.ask("What is the capital of Belmora?", sources=True)
    check(answer, by_hand(eager(tiny_checkpoint), answer, context))
    assert answer.sources is not None
    assert answer.sources[0].chunk.name == "belmora"
    assert answer.sources[0].share > 0.5


def test_the_document_that_holds_the_fact_is_first_wherever_it_stands(tiny: Braid) -> None:
    right = first = 0
    for number in range(24):
        sample = held_out_sample((2, 4, 6)[number % 3], "direct", 30_000 + number)
        (question,) = sample.questions
        texts = list(sample.documents)
        gold = texts.pop(question.document)
        texts.insert(number % (len(texts) + 1), gold)
        if not all(map(str.strip, texts)):
            continue
        rules = [tiny.register_system(sample.system)] if sample.system else []
        docs = tiny.register_many(texts, progress=False)
        answer = tiny.ask(question.text, chunks=[*rules, *docs], max_new_tokens=24, sources=True)
        if answer.text == question.answer:
            assert answer.sources is not None
            right += 1
            first += answer.sources[0].chunk.text == gold.strip()
    assert right >= 20
    assert first >= 0.95 * right


def test_pieces_and_the_whole_are_the_same(context: Context, looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = context.ask("Which?", max_new_tokens=20, sources=True)
    monkeypatch.setattr(attribution, "PIECE_ROWS", 7)
    same(context.ask("Which?", max_new_tokens=20, sources=True), whole)
    assert looks == [20, 7, 7, 6]


def test_in_bfloat16_shares_are_nearly_the_same(random_checkpoint: Path, tmp_path: Path) -> None:
    """Where the C kernels compute, torch's log-sum-exp sees their queries."""
    found = []
    for dtype in ("float32", "bfloat16"):
        with Braid(random_checkpoint, store=tmp_path / dtype, device="cpu", dtype=dtype) as opened:
            context = opened.compose(opened.register_many(TEXTS, names=NAMES))
            found.append(by_name(context.ask("Which?", max_new_tokens=1, sources=True))[0])
            if dtype == "bfloat16" and native.obstacle() is None:
                assert opened.kernels.backends["attention"] == "native"
    assert found[1] == pytest.approx(found[0], abs=0.02)  # scores of size 5, rounded to 8 bits


def test_the_layers_lie_beyond_the_middle() -> None:
    assert layers_of(24) == range(13, 21)
    assert layers_of(28) == range(15, 24)
    for count in range(1, 100):
        layers = layers_of(count)
        assert len(layers) > 0
        assert layers[-1] < count


# what it costs


def test_nothing_is_computed_unless_it_is_asked_for(
    random_braid: Braid, context: Context, documents: list[Chunk], looks: list[int]
) -> None:
    answer = context.ask("Which?", max_new_tokens=4)
    assert (answer.sources, answer.token_sources, looks) == (None, None, [])
    again = context.ask("Which?", max_new_tokens=4, sources=True)
    assert again.token_ids == answer.token_ids
    assert again.usage == answer.usage
    assert looks == [4]


def test_nothing_is_written(
    random_checkpoint: Path, page_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the same once more: rows that are computed together round differently."""
    equal: list[bool] = []
    honest = Decoder.attention_shares

    def watched(self: Decoder, batch, kv, layers):
        before = kv.clone()
        shares = honest(self, batch, kv, layers)
        equal.append(torch.equal(kv.view(torch.int32), before.view(torch.int32)))
        return shares

    monkeypatch.setattr(Decoder, "attention_shares", watched)
    small = {"device": "cpu", "dtype": "float32", "pool_bytes": 12 * page_bytes}
    with Braid(random_checkpoint, store=tmp_path, **small) as braid:
        context = braid.compose(braid.register_many(TEXTS))
        context.ask("Which?", max_new_tokens=9, sources=True)
    assert equal == [True]


def test_other_answers_go_on_between_pieces(
    random_braid: Braid, context: Context, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "PIECE_ROWS", 2)
    steps: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, batch, kv, logit_rows):
        steps.append(len(looks))
        return forward(self, batch, kv, logit_rows)

    monkeypatch.setattr(Decoder, "forward", counted)
    with context.stream("Why?", max_new_tokens=60) as other:
        next(other)
        context.ask("Which?", max_new_tokens=12, sources=True)
        for _ in other:
            pass
    assert len(looks) == 6
    assert {1, 2, 3, 4, 5} <= set(steps), "a step of the other one after each piece"


# every way to ask


def test_streams_and_event_loops_give_them_too(random_braid: Braid, context: Context, documents: list[Chunk]) -> None:
    want = context.ask("Which?", max_new_tokens=6, sources=True)
    chunks = documents

    def read(stream) -> Answer:
        for _ in stream:
            pass
        return stream.answer

    async def later() -> list[Answer]:
        streams = [
            context.astream("Which?", max_new_tokens=6, sources=True),
            random_braid.astream("Which?", chunks=chunks, max_new_tokens=6, sources=True),
        ]
        for stream in streams:
            async for _ in stream:
                pass
        return [
            *(stream.answer for stream in streams),
            await context.aask("Which?", max_new_tokens=6, sources=True),
            await random_braid.aask("Which?", chunks=chunks, max_new_tokens=6, sources=True),
        ]

    answers = [
        read(context.stream("Which?", max_new_tokens=6, sources=True)),
        read(random_braid.stream("Which?", chunks=chunks, max_new_tokens=6, sources=True)),
        random_braid.ask("Which?", chunks=chunks, max_new_tokens=6, sources=True),
        *asyncio.run(later()),
    ]
    for answer in answers:
        same(answer, want)


def test_many_at_once(random_braid: Braid, documents: list[Chunk]) -> None:
    rules, *docs = documents
    contexts = [random_braid.compose([rules, *docs[at:], *docs[:at]]) for at in range(3)] * 2
    asked = [(context, "Which?" + " Why?" * at) for at, context in enumerate(contexts)]
    together = random_braid.ask_many(asked, max_new_tokens=9, sources=True)
    for (context, question), answer in zip(asked, together, strict=True):
        same(answer, context.ask(question, max_new_tokens=9, sources=True))


def test_history_gets_no_share(braid: Braid, peer: PreTrainedModel) -> None:
    context = braid.compose(braid.register_many(TEXTS, names=NAMES, replace=True), mode="exact")
    first = context.ask("Which?", max_new_tokens=9, sources=True)
    history = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": first.text}]
    answer = context.ask("And why?", history=history, max_new_tokens=9, sources=True)
    assert answer.usage.cached_tokens > len(context.input_ids), "the turn was kept"
    check(answer, by_hand(peer, answer, context))


def test_sampled_answers_and_stop_strings(braid: Braid, peer: PreTrainedModel) -> None:
    context = braid.compose(braid.register_many(TEXTS, names=NAMES, replace=True), mode="exact")
    drawn = context.ask("Which?", max_new_tokens=12, temperature=2.0, seed=3, sources=True)
    assert drawn.token_ids != context.ask("Which?", max_new_tokens=12).token_ids
    check(drawn, by_hand(peer, drawn, context))
    stop = drawn.text[4:7]
    cut = context.ask("Which?", max_new_tokens=12, temperature=2.0, seed=3, stop=stop, sources=True)
    assert cut.finish_reason == "stop"
    check(cut, by_hand(peer, cut, context))
    assert cut.token_ids == drawn.token_ids[: len(cut.token_ids)]


def test_the_tokens_texts_make_up_the_text(tiny: Braid) -> None:
    rules = tiny.register_system("You answer questions from the documents.")
    doc = tiny.register("The capital of Aistonia is Flubarg.", anchor=rules)
    answer = tiny.ask("What is the capital of Aistonia?", chunks=[rules, doc], sources=True)
    assert answer.token_sources is not None
    assert "".join(token.text for token in answer.token_sources) == answer.text == "Flubarg."
    assert answer.token_sources[-1].text == "", "the end of the answer"


def test_without_documents_there_are_none(random_braid: Braid) -> None:
    for chunks in ([], [random_braid.register_system("Answer.")]):
        answer = random_braid.ask("Which?", chunks=chunks, max_new_tokens=3, sources=True)
        assert answer.sources == ()
        assert [token.shares for token in answer.token_sources or ()] == [()] * 3


def test_a_fake_gives_each_token_the_same_weight() -> None:
    with FakeBraid() as braid:
        docs = braid.register_many(["12345678", "123"], names=["long", "short"])
        answer = braid.ask("Which?", chunks=docs, sources=True)
    check(answer, ({"long": 9 / 13, "short": 4 / 13}, [{"long": 9 / 13, "short": 4 / 13}] * len(answer.token_ids)))


def test_answers_with_sources_can_be_pickled(context: Context) -> None:
    answer = context.ask("Which?", max_new_tokens=3, sources=True)
    assert pickle.loads(pickle.dumps(answer)) == answer


# what fails


def test_a_look_that_fails_fails_its_request_alone(
    random_braid: Braid, context: Context, pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "attention_shares", broken)
        with context.stream("Why?", max_new_tokens=30) as other:
            next(other)
            with pytest.raises(RuntimeError, match="no memory"):
                context.ask("Which?", max_new_tokens=3, sources=True)
            assert "".join(other)
    pool_of(random_braid)
    assert context.ask("Which?", max_new_tokens=3, sources=True).sources


def test_a_stream_that_is_closed_during_the_look_gives_all_back(
    random_braid: Braid, context: Context, looks: list[int], pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "PIECE_ROWS", 1)
    stream = context.stream("Which?", max_new_tokens=40, sources=True)
    next(stream)
    counted = Decoder.attention_shares

    def closing(self: Decoder, batch, kv, layers):
        stream.close()
        return counted(self, batch, kv, layers)

    monkeypatch.setattr(Decoder, "attention_shares", closing)
    for _ in stream:
        pass
    context.ask("Why?", max_new_tokens=1)
    pool_of(random_braid)
    assert len(looks) < 40


def test_what_is_not_a_bool_is_refused(context: Context) -> None:
    with pytest.raises(InputError, match=r"sources must be True or False; got 'yes'\."):
        context.ask("Which?", sources="yes")  # type: ignore[arg-type]


# plots


@pytest.fixture
def agg(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")


@pytest.mark.usefixtures("agg")
def test_a_plot_shows_every_token_and_document(context: Context, tmp_path: Path) -> None:
    from matplotlib import pyplot

    answer = context.ask("Which?", max_new_tokens=5, sources=True)
    assert answer.sources is not None
    ax = answer.plot_sources()
    (image,) = ax.images
    assert image.get_array().shape == (3, 5)
    assert image.get_array()[0, 2] == pytest.approx(answer.token_sources[2].shares[0])
    assert [label.get_text().split()[0] for label in ax.get_yticklabels()] == [s.chunk.name for s in answer.sources]
    ax.figure.savefig(tmp_path / "sources.png")
    assert answer.plot_sources(ax) is ax
    pyplot.close(ax.figure)


def test_without_matplotlib_a_plot_says_what_to_install(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = context.ask("Which?", max_new_tokens=2, sources=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BraidError, match=r'pip install "braidsdk\[viz\]"'):
        answer.plot_sources()


def test_an_answer_without_sources_has_no_plot(random_braid: Braid, context: Context) -> None:
    with pytest.raises(InputError, match="ask with sources=True"):
        context.ask("Which?", max_new_tokens=2).plot_sources()
    with pytest.raises(InputError, match="got no document"):
        random_braid.ask("Which?", chunks=[], max_new_tokens=2, sources=True).plot_sources()
