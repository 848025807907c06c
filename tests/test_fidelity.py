"""How close modes come to full prefill: the figures, what is kept, the certificates, and the questions' files."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from braidsdk import Answer, Braid, Chunk, Context, FidelityReport
from braidsdk.engine import loop
from braidsdk.errors import BraidError, InputError, UnknownChunkError, UnknownModeError
from braidsdk.fidelity import outcomes
from braidsdk.fidelity.bootstrap import estimate, mean, mean_difference, p95, share_recovered
from braidsdk.fidelity.measure import compared
from braidsdk.fidelity.questions import Question, parse_questions, read_questions
from braidsdk.fidelity.scores import contains, exact_match, f1, says_not_found
from braidsdk.testing import FakeBraid

RULES = "You answer questions from the documents."
TEXTS = [f"The capital of {land} is {city}." for land, city in (("Aistonia", "Flubarg"), ("Belmora", "Plonk"))]
ASKED = [f"What is the capital of {land}?" for land in ("Aistonia", "Belmora")]


def registered(braid: Braid) -> list[Chunk]:
    rules = braid.register_system(RULES)
    return [rules, *braid.register_many(TEXTS, anchor=rules, progress=False)]


# the figures


def plain_logits(peer: Any, context: Context, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """What transformers computes if no chunk sees another one, with masks alone. RoPE only knows distances, so where a
    chunk stands does not matter."""
    tokens = torch.tensor([[*prompt, *ids[:-1]]])
    visible = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    for chunk in context.explain().chunks:
        visible[chunk.position : chunk.position + chunk.tokens, : chunk.position] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits: torch.Tensor = peer(tokens, attention_mask=mask[None, None]).logits[0, len(prompt) - 1 :]
    return logits


def test_kl_and_top1_equal_a_plain_computation(random_braid: Braid, random_checkpoint: Path) -> None:
    peer = AutoModelForCausalLM.from_pretrained(random_checkpoint, attn_implementation="eager").eval()
    chunks = registered(random_braid)
    report = random_braid.fidelity(chunks, ASKED, ["isolated"], max_new_tokens=12)
    kls, tops = [], []
    for question in ASKED:
        exact, context = (random_braid.compose(chunks, mode=mode) for mode in ("exact", "isolated"))
        prompt, ids = exact.prompt_ids(question), exact.ask(question, max_new_tokens=12).token_ids
        with torch.inference_mode():
            truth = peer(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
        assert tuple(truth.argmax(-1).tolist()) == ids, "full prefill's own greedy answer"
        own = plain_logits(peer, context, prompt, ids).double().log_softmax(-1)
        kls.append(float((truth.exp() * (truth - own)).sum(-1).mean()))
        tops.append(float((truth.argmax(-1) == own.argmax(-1)).double().mean()))
    assert min(kls) > 1e-3, "there is something to measure"
    assert max(tops) < 1.0
    # logits agree with transformers to about 1e-6 of the largest
    isolated = report["isolated"]
    assert isolated.kl.value == pytest.approx(sum(kls) / 2, rel=1e-3)
    assert isolated.kl_p95.value == pytest.approx(min(kls) + 0.95 * (max(kls) - min(kls)), rel=1e-3)
    assert isolated.top1.value == pytest.approx(sum(tops) / 2)


def test_full_prefill_agrees_with_itself(tiny: Braid) -> None:
    chunks = registered(tiny)
    report = tiny.fidelity(chunks, ASKED, ["exact", "anchored"], references=[["Flubarg", "flubarg city"], "Plonk"])
    full, anchored = report.modes
    assert (full.mode, anchored.mode) == ("exact", "anchored")
    assert (full.kl.value, full.kl_p95.value, full.top1.value) == (0.0, 0.0, 1.0)
    assert (full.budget.value, full.faster.value, full.new_not_found.value) == (1.0, 1.0, 0.0)
    assert (full.exact_match, full.f1) == (full.contains, full.contains)
    assert report.full_prefill_fails == 1 - full.contains.value == 0.0
    assert full.prefix.value == sum(len(each.outcomes["exact"].token_ids) for each in report.measured) / 2
    assert anchored.budget.value == 0.0, "everything is cached"
    assert anchored.kl.value > 0.0
    assert full.recovered.value == 1.0
    assert full.worse.value == 0.0
    assert anchored.worse is None
    assert full.against["kl"].value == pytest.approx(-anchored.kl.value)
    assert not anchored.against
    assert (report.fewest_chunks, report.most_chunks, report.questions) == (2, 2, 2)


def test_logits_along_an_answer_are_those_of_one_token_after_another(
    other: Callable[..., Braid], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = (3, 900, 17, 4, 4)
    with other() as braid:
        context = braid.compose(registered(braid))
        want = context.answer_logits("Well?", answer)
        assert want.shape == (5, 1024)
        torch.testing.assert_close(want[0], context.next_token_logits("Well?"), rtol=0, atol=1e-5)
        assert not torch.equal(want[1], want[2])
        for count in range(1, 5):
            row = context.answer_logits("Well?", answer[: count + 1])[-1]
            torch.testing.assert_close(row, want[count], rtol=0, atol=1e-5)  # logits reach about 1
        for bad in ((), (1024,), (-1,), (1.0,), (True,)):
            with pytest.raises(InputError, match="token_ids must be at least one id from 0 to 1023"):
                context.answer_logits("Well?", bad)
    monkeypatch.setattr(loop, "STEP_TOKENS", {"cpu": 3})
    with other() as braid:
        again = braid.compose(registered(braid)).answer_logits("Well?", answer)
        torch.testing.assert_close(again, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "anchored", "isolated", "linked(2)", "guided(0.4)", "blended(0.4)"])
def test_along_its_own_answer_a_mode_has_its_own_choices(random_braid: Braid, mode: str) -> None:
    """The answer must not change what a mode does with the question."""
    context = random_braid.compose(registered(random_braid), mode=mode)
    ids = context.ask("Well?", max_new_tokens=12).token_ids
    assert tuple(context.answer_logits("Well?", ids).argmax(-1).tolist()) == ids


def test_repairs_count_in_the_budget(random_braid: Braid) -> None:
    report = random_braid.fidelity(registered(random_braid), ASKED, ["anchored", "linked(2)"], max_new_tokens=4)
    assert 0.0 == report["anchored"].budget.value < report["linked(2)"].budget.value < 0.5
    assert report["linked(2)"].kl.value > 0.0


def test_a_divergence_is_that_of_the_definition() -> None:
    truth, own = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    kl, top1 = compared(truth.log(), own.log() + 3.0)
    want = (0.25 * math.log(0.5) + 0.75 * math.log(1.5) + 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)) / 2
    assert kl == pytest.approx(want)
    assert top1 == 0.0


@pytest.mark.parametrize(
    ("answer", "references", "em", "best_f1", "holds"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1.0, 1),
        ("in 1874", ["1874"], 0, 2 / 3, 1),
        ("a  an THE", ["the"], 1, 1.0, 0),
        ("Santa Clara, California", ["Levi's Stadium", "Santa Clara"], 0, 0.8, 1),
        ("18740", ["1874"], 0, 0.0, 0),
        ("big big dog", ["big dog big cat"], 0, 6 / 7, 0),
        ("", ["dog"], 0, 0.0, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_answers_are_judged_as_squad_does(
    answer: str, references: list[str], em: int, best_f1: float, holds: int
) -> None:
    assert exact_match(answer, references) == em
    assert f1(answer, references) == pytest.approx(best_f1)
    assert contains(answer, references) == holds


def test_saying_that_it_is_not_there_is_found_in_any_spelling() -> None:
    assert says_not_found("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, it is NOT\nmentioned here.")
    assert not says_not_found("Flubarg.")
    assert says_not_found("Flubarg.", ["flub"])


def test_new_not_found_answers_are_those_that_full_prefill_does_not_give(random_braid: Braid) -> None:
    def new(*phrases: str) -> list[float]:
        report = random_braid.fidelity(chunks, ASKED, ["isolated"], max_new_tokens=12, not_found=phrases)
        return [each.new_not_found.value for each in report.modes]

    chunks = registered(random_braid)
    report = random_braid.fidelity(chunks, ASKED, ["isolated"], max_new_tokens=12)
    (full, own), *_ = [[each.outcomes[mode].text for mode in ("exact", "isolated")] for each in report.measured]
    assert full != own
    assert new(own) == [0.0, 0.5]
    assert new(full) == [0.0, 0.0]
    assert new(own, full) == [0.0, 0.0], "full prefill says so, too"


# intervals


def test_an_interval_is_the_same_for_the_same_seed_and_covers_the_figure() -> None:
    values = [0.1, 0.9, 0.4, 0.4, 0.7, 0.2]
    one = estimate(mean, values, seed=3)
    assert one == estimate(mean, values, seed=3)
    assert one != estimate(mean, values, seed=4)
    assert one.low < one.value < one.high
    assert one.value == pytest.approx(0.45)
    # the interval of a mean is about that of the normal distribution
    spread = 1.96 * torch.tensor(values).std(correction=0).item() / math.sqrt(6)
    assert one.high - one.low == pytest.approx(2 * spread, rel=0.15)
    assert estimate(p95, [0.0] * 99 + [1.0], seed=0).value == 0.0


def test_modes_are_compared_over_the_same_draws() -> None:
    hard = [0.1, 5.0, 0.3, 9.0]
    shifted = estimate(mean_difference, [each + 1 for each in hard], hard, seed=0)
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((1, 1, 1))
    halved = estimate(share_recovered, [each / 2 for each in hard], hard, seed=0)
    assert (halved.value, halved.low, halved.high) == pytest.approx((0.5, 0.5, 0.5))


# samples, and going on


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The questions that were answered so far, each as often as it was."""
    said: list[str] = []
    real = Context.ask

    def counted(self: Context, question: str, **options: Any) -> Answer:
        said.append(f"{self.mode}: {question}")
        return real(self, question, **options)

    monkeypatch.setattr(Context, "ask", counted)
    return said


def measured(braid: Braid, **settings: Any) -> FidelityReport:
    questions = [f"Which {word}?" for word in ("one", "two", "three", "four")]
    return braid.fidelity(registered(braid), questions, **{"max_new_tokens": 3, "progress": False, **settings})


def test_an_interrupted_run_goes_on_where_it_stopped(
    other: Callable[..., Braid], asks: list[str], tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == 4
        if done == 2:
            raise KeyboardInterrupt

    with other() as braid, pytest.raises(KeyboardInterrupt):
        measured(braid, on_progress=interrupt)
    file = tmp_path / "store" / "outcomes.jsonl"
    file.write_bytes(file.read_bytes()[:-40])  # as if the last line had been cut off
    asks.clear()
    with other() as braid:
        whole = measured(braid)
        assert set(asks) == {
            f"{mode}: Which {word}?" for mode in ("exact", "anchored") for word in ("three", "four")
        } | {"anchored: Which two?"}
        asks.clear()
        assert measured(braid).to_dict() == whole.to_dict()
        assert not asks
        more = measured(braid, modes=["anchored", "isolated"])
        assert {each.partition(":")[0] for each in asks} == {"isolated"}
        assert more["anchored"] == whole["anchored"]
        asks.clear()
        measured(braid, max_new_tokens=2)
        assert len(set(asks)) == 8


def test_few_outcomes_of_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "MOST_KEPT", 10)
    kept = outcomes.Outcomes(tmp_path / "o.jsonl")
    one = outcomes.Outcome("anchored", "Yes.", (1, 2), 0.5, 0.5, 1, 0.0, 3.0, 2)
    for number in range(12):
        kept.keep(str(number), replace(one, prefix=number))
    again = outcomes.Outcomes(tmp_path / "o.jsonl")
    assert again.find("11") == replace(one, prefix=11)
    third = outcomes.Outcomes(tmp_path / "o.jsonl")
    assert [third.find(str(number)) is not None for number in range(12)] == [False] * 7 + [True] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl"]


def test_a_larger_sample_holds_a_smaller_one(other: Callable[..., Braid]) -> None:
    with other() as braid:
        numbers = [[each.case.number for each in measured(braid, sample=n, seed=1).measured] for n in (1, 2, 4)]
        assert [len(each) for each in numbers] == [1, 2, 4]
        assert set(numbers[0]) < set(numbers[1]) < set(numbers[2]) == {0, 1, 2, 3}
        assert measured(braid, sample=2, seed=1).setting.given == 4


# what questions are asked over


def test_passages_are_there_only_while_they_are_measured(other: Callable[..., Braid]) -> None:
    with other() as braid:
        rules, first, _ = registered(braid)
        before = [chunk.id for chunk in braid.chunks.list()], braid.stats().entries
        items = [
            {"question": "Which?", "passages": ["One text.", "Another text.", TEXTS[0]]},
            {"question": "Which?", "chunks": [first.id]},
            {"question": "Which?"},
        ]
        report = braid.fidelity([rules], items[:2], max_new_tokens=2)
        assert [each.case.context_chunks for each in report.measured] == [3, 1]
        assert [each.case.chunk_ids[0] for each in report.measured] == [rules.id, rules.id]
        assert ([chunk.id for chunk in braid.chunks.list()], braid.stats().entries) == before
        assert report["anchored"].budget.value == 0.0
        with pytest.raises(InputError, match="Question 3 must be asked over at least one context chunk"):
            braid.fidelity([rules], items, max_new_tokens=2)


def test_without_a_system_prompt_and_on_a_fake(tmp_path: Path) -> None:
    with FakeBraid({"What?": "A fake answer."}) as braid:
        text = braid.register("A text.")
        report = braid.fidelity([text], ["What?"], ["isolated"], references=["fake answer"])
        assert report["isolated"].exact_match.value == 1.0
        assert report["isolated"].kl.value == 0.0
        assert report.setting.baseline is None
        assert report["isolated"].recovered is None
        assert not report["isolated"].against
        assert braid.ask("What?", chunks=[text], mode="isolated").fidelity.contains == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"questions": []}, InputError, "at least one question; got none"),
        ({"questions": "What?"}, InputError, "must be a list; got a str"),
        ({"questions": [" "]}, InputError, r"questions\[0\] must have a text"),
        ({"questions": [7]}, InputError, r"questions\[0\] must be a text, or an object"),
        ({"modes": ["anchord"]}, UnknownModeError, "Did you mean 'anchored'"),
        ({"modes": "anchored"}, InputError, "modes must be a list"),
        ({"modes": []}, InputError, "modes must be a list with at least one mode"),
        ({"chunks": ["nobody"]}, UnknownChunkError, "nobody"),
        ({"questions": [{"question": "What?", "chunks": ["nobody"]}]}, UnknownChunkError, "nobody"),
        ({"questions": [{"question": "What?", "chunks": ["a"], "passages": ["b"]}]}, InputError, "it has both"),
        ({"questions": [{"question": "What?", "passages": []}]}, InputError, "must be a list of texts"),
        ({"references": ["a", "b"]}, InputError, "expected 1, got 2"),
        ({"references": "a"}, InputError, "expected 1, got a str"),
        ({"references": [3]}, InputError, r"references\[0\] must be a list of texts"),
        ({"sample": 0}, InputError, "sample must be a whole number from 1 to 1"),
        ({"sample": 2}, InputError, "sample must be a whole number from 1 to 1"),
        ({"seed": -1}, InputError, "seed must be"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens"),
        ({"not_found": "no"}, InputError, "not_found must be a list of phrases"),
        ({"chunks": []}, InputError, "at least one context chunk"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_what_cannot_be_measured_is_refused(
    random_braid: Braid, arguments: dict[str, Any], error: type[BraidError], says: str
) -> None:
    chunks = registered(random_braid)
    with pytest.raises(error, match=says):
        random_braid.fidelity(**{"chunks": chunks, "questions": ["What?"], **arguments})
    assert not random_braid.ask("What?", chunks=chunks, max_new_tokens=1).fidelity


# certificates


def test_answers_carry_the_certificate_that_fits(
    other: Callable[..., Braid], random_checkpoint: Path, tmp_path: Path
) -> None:
    def found(braid: Braid, mode: str = "anchored", count: int = 2) -> bool:
        rules, *texts = registered(braid)
        context = braid.compose([rules, *texts[:count]], mode=mode)
        answer = context.ask("Well?", max_new_tokens=1)
        with context.stream("Well?", max_new_tokens=1) as pieces:
            list(pieces)
            assert pieces.answer.fidelity == answer.fidelity
        return answer.fidelity is not None

    with other() as braid:
        assert not found(braid)
        report = measured(braid, sample=2, modes=["anchored"])
        assert found(braid)
        certificate = braid.ask("Well?", chunks=registered(braid), mode="anchored", max_new_tokens=1).fidelity
        assert certificate.mode == "anchored"
        assert (certificate.questions, certificate.kl) == (2, report["anchored"].kl.value)
        assert "anchored: KL" in str(certificate)
        assert "(2 questions over 2 chunks)" in str(certificate)
        assert not found(braid, "isolated"), "another mode"
        assert not found(braid, count=1), "another number of chunks"
    flipped = shutil.copytree(random_checkpoint, tmp_path / "flipped")
    weights = bytearray((flipped / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (flipped / "model.safetensors").write_bytes(weights)
    with other(flipped) as braid:
        assert not found(braid), "a flipped bit"
    with other(dtype="bfloat16") as braid:
        assert not found(braid), "another dtype"
    with other(namespace="else") as braid:
        assert not found(braid), "another namespace"
    with other() as braid:
        assert found(braid), "a later process"


def test_certificates_of_several_numbers_of_chunks_stand_beside_each_other(other: Callable[..., Braid]) -> None:
    with other() as braid, other() as second:
        rules, first, last = registered(braid)
        for some, count in (([first], 1), ([first, last], 2), ([first], 3)):
            braid.fidelity([rules, *some], ["Well?"] * count, max_new_tokens=1)
        for opened in (braid, second):
            one, two = (
                opened.ask("Well?", chunks=[rules.id, *ids], max_new_tokens=1)
                for ids in ([first.id], [first.id, last.id])
            )
            assert (one.fidelity.questions, two.fidelity.questions) == (3, 2), "the newest of each"


# questions' files


def test_files_of_every_form_are_read(tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    file.write_text(json.dumps([{"question": "A?", "answers": "a", "chunks": ["x"]}, "B?"]))
    assert read_questions(file) == [Question("A?", ("a",), ("x",)), Question("B?")]
    shared = {"source": "s", "passages": [{"title": "t", "text": "One."}, "Two."]}
    file.write_text(json.dumps({**shared, "questions": [{"question": "A?", "gold": 1, "passages": [1, 0, "Three."]}]}))
    assert read_questions(file) == [Question("A?", (), None, ("Two.", "One.", "Three."))]
    lines = tmp_path / "q.jsonl"
    lines.write_text('\ufeff{"question": "A?", "answers": ["a", "b"]}\n\n"B?"\n', encoding="utf-8")
    assert read_questions(lines) == [Question("A?", ("a", "b")), Question("B?")]
    assert parse_questions(read_questions(file)) == read_questions(file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("q.json", '[{"question": "A?"},\n {"question": }]', "line 2, column 15 is not"),
        ("q.json", '{"question": "A?"}\n{"question": "B?"}', "line 2, column 1 is not: Extra data. JSON lines have"),
        ("q.json", '["A?", {"answers": ["a"]}]', "question 2 must have a text"),
        ("q.json", '{"questions": 3}', "must hold a list of questions"),
        ("q.json", "[]", "at least one question"),
        ("q.json", '{"passages": {}, "questions": ["A?"]}', '"passages" of .* must be a list'),
        ("q.json", '{"passages": ["x"], "questions": [{"question": "A?", "passages": [1]}]}', "place 1 is 1"),
        ("q.jsonl", '{"question": "A?"}\n\n{"question": 3}', "line 3 must have a text"),
        ("q.jsonl", '{"question": "A?"}\n{', "line 2, column 2 is not"),
        ("q.jsonl", "\n", "it is empty"),
        ("q.json", "[" * 100_000, "q.json must be JSON"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, name: str, content: str, says: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(InputError, match=says):
        read_questions(file)
    with pytest.raises(InputError, match="can't be read"):
        read_questions(tmp_path / "nowhere.json")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="must be text in UTF-8"):
        read_questions(file)


# reports


def test_a_report_is_a_table_and_json(tiny: Braid) -> None:
    report = tiny.fidelity(registered(tiny), ASKED, ["anchored", "isolated"], references=["Flubarg", None])
    text = str(report)
    lines = text.splitlines()
    assert lines[0].startswith("braid-tiny, float32 on cpu: 2 questions over 2 chunks")
    assert lines[2].split() == ["exact", "anchored", "isolated"]
    more = [each.outcomes["isolated"].kl > each.outcomes["anchored"].kl for each in report.measured]
    assert report["isolated"].worse.value == sum(more) / 2
    for label in (
        "more KL than anchored",
        "KL, nats",
        "same likeliest token",
        "contains the reference",
        "budget",
        "KL of anchored recovered",
    ):
        assert any(line.startswith(label) for line in lines), label
    assert "to 0% of 1 question." in lines[-3]
    assert not any(line.endswith(" ") for line in lines)
    document = json.loads(json.dumps(report.to_dict()))
    assert [each["mode"] for each in document["modes"]] == ["exact", "anchored", "isolated"]
    assert document["outcomes"][0]["modes"]["exact"]["text"] == "Flubarg."
    assert document["with_references"] == 1
    assert document["outcomes"][1]["answers"] == []


def test_a_plot_needs_matplotlib_and_says_so(tiny: Braid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tiny.fidelity(registered(tiny), ASKED[:1])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(BraidError, match=r'pip install "braidsdk\[viz\]"'):
        report.plot(tmp_path / "plot.png")


def test_a_plot_shows_every_mode(tiny: Braid, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = tiny.fidelity(registered(tiny), ASKED, ["anchored", "isolated"], references=["Flubarg", "Plonk"])
    report.plot(tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {mode} -->" in drawn for mode in ("exact", "anchored", "isolated"))
    with pytest.raises(BraidError, match="png"):
        report.plot(tmp_path / "plot.nothing")
