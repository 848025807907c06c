"""Conversations: the ids of past turns, and what of them is computed again."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from braidsdk import Answer, Braid, Context
from braidsdk.cache.pool import Pool
from braidsdk.cache.resident import Resident
from braidsdk.compose.composition import Composition
from braidsdk.errors import EmptyTextError, InputError, UnsupportedModelError, WindowExceededError
from braidsdk.prompt.history import Spoken, SpokenTurns, Turn, conversation
from braidsdk.prompt.layout import PromptLayout
from braidsdk.types import LEVEL_QUERY

TEXTS = ["Oslo is a city. " * 6, "Rome is a city too, and Bern.", "Graz is one. " * 9]
QUESTIONS = ["Which of them?", "And what about Rome?", "Why?", "Really?"]

PoolOf = Callable[[Braid], Pool]

TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit. float32 sums in another order; we have seen 1e-6."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def compose(braid: Braid, mode: str = "exact", texts: list[str] = TEXTS) -> Context:
    rules = braid.register_system("You answer questions.")
    return braid.compose([rules, *braid.register_many(texts, anchor=rules)], mode=mode)


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def talk(context: Context, count: int, **options: object) -> tuple[list[dict[str, str]], list[Answer]]:
    """A conversation of `count` turns."""
    history: list[dict[str, str]] = []
    answers = []
    for question in QUESTIONS[:count]:
        answers.append(context.ask(question, history=history, **options))  # type: ignore[arg-type]
        history += said(question, answers[-1].text)
    return history, answers


@pytest.fixture
def layout(random_checkpoint: Path) -> PromptLayout:
    return PromptLayout(random_checkpoint)


@pytest.fixture
def one_memory_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one Braid said, others know."""
    turns = SpokenTurns()
    monkeypatch.setattr("braidsdk.engine.engine.SpokenTurns", lambda: turns)


@pytest.fixture
def fresh(random_checkpoint: Path, tmp_path: Path) -> Iterator[Braid]:
    """Another Braid, that has not seen the conversation."""
    with Braid(random_checkpoint, store=tmp_path / "fresh", device="cpu", dtype="float32") as braid:
        yield braid


def test_an_answer_that_a_history_cannot_hold_is_not_remembered() -> None:
    turns = SpokenTurns()
    for text in ("", " \n", "\u0301\u0323" * 300):
        turns.remember((1,), text, Spoken((2,), 1))
        assert turns.recall((1,), text) is None


def control(layout: PromptLayout) -> int:
    """Tokens between an answer and the next question, and between a question and its answer."""
    return len(layout.turn_ids) + len(layout._closing)


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("exact", "its end token"),
        ("exact", "length"),
        ("exact", "a stop string"),
        ("anchored", "its end token"),
        ("isolated", "length"),
    ],
)
def test_the_next_turn_computes_only_what_is_new(
    random_braid: Braid, layout: PromptLayout, mode: str, ending: str
) -> None:
    context = compose(random_braid, mode)
    whole = context.ask(QUESTIONS[0], max_new_tokens=20)
    options: dict[str, object] = {"max_new_tokens": 20}
    if ending == "its end token":
        options["stop_ids"] = [whole.token_ids[12]]
    elif ending == "a stop string":
        start = len(layout.decode(whole.token_ids[:13]))
        options["stop"] = whole.text[start : start + 6]
    history, answers = talk(context, 3, **options)
    for turn in (1, 2):
        answer, before = answers[turn], answers[turn - 1]
        past = before.prompt_ids + before.token_ids[: _spoken(layout, before)]
        assert answer.prompt_ids == past + layout.turn_ids + layout.question_ids(QUESTIONS[turn]), "the very same ids"
        new = len(layout._encode(QUESTIONS[turn])) + control(layout)
        cut_off = before.finish_reason == "length"
        assert answer.usage.computed_tokens == new + cut_off, "the last token of an answer cut off was never computed"
        assert answer.usage.cached_tokens == answer.usage.prompt_tokens - answer.usage.computed_tokens
    assert len(history) == 6


def _spoken(layout: PromptLayout, answer: Answer) -> int:
    """How many of an answer's ids its text is made of."""
    return next(n for n in range(len(answer.token_ids), -1, -1) if layout.decode(answer.token_ids[:n]) == answer.text)


@pytest.mark.usefixtures("one_memory_of_turns")  # or it would encode the answers of the other from their texts
@pytest.mark.parametrize("mode", ["exact", "anchored"])
def test_logits_over_a_resident_history_equal_those_computed_from_scratch(
    random_braid: Braid, fresh: Braid, mode: str, tail_logits: Callable[[Braid, Composition], torch.Tensor]
) -> None:
    context = compose(random_braid, mode)
    history, answers = talk(context, 3, max_new_tokens=30)
    got = context.next_token_logits(QUESTIONS[3], history=history)
    scratch = compose(fresh, mode)
    assert scratch.prompt_ids(QUESTIONS[3], history=history) == context.prompt_ids(QUESTIONS[3], history=history)
    assert relative_error(scratch.next_token_logits(QUESTIONS[3], history=history), got) < TOLERANCE
    if mode == "exact":
        plain = tail_logits(fresh, Composition("exact", (), tail=context.prompt_ids(QUESTIONS[3], history=history)))
        assert relative_error(got, plain) < TOLERANCE
    assert relative_error(got, context.next_token_logits(QUESTIONS[3])) > 100 * TOLERANCE, "the history matters"
    assert answers[2].prompt_ids[: len(answers[1].prompt_ids)] == answers[1].prompt_ids


def test_an_evicted_history_is_computed_again(
    random_braid: Braid, pool_of: PoolOf, evict: Callable[[Braid, Sequence[Resident]], None]
) -> None:
    context = compose(random_braid)
    history, _ = talk(context, 2, max_new_tokens=30)
    want = context.ask(QUESTIONS[2], history=history, max_new_tokens=9)
    turns = turns_in(pool_of(random_braid))
    assert len(turns) == 3
    evict(random_braid, turns)
    again = context.ask(QUESTIONS[2], history=history, max_new_tokens=9)
    assert again.token_ids == want.token_ids
    assert again.prompt_ids == want.prompt_ids
    assert again.usage.computed_tokens == len(want.prompt_ids) - len(context.input_ids)


def test_modes_do_not_share_the_history_of_the_same_ids(random_braid: Braid) -> None:
    """The turn has seen other entries of the chunks, though the same ids stand before it."""
    exact, anchored = compose(random_braid, "exact"), compose(random_braid, "anchored")
    anchored.prepare()
    history, _ = talk(exact, 1, max_new_tokens=20)
    assert anchored.input_ids == exact.input_ids
    new = len(anchored.prompt_ids(QUESTIONS[1], history=history)) - len(anchored.input_ids)
    usage = [anchored.ask(QUESTIONS[1], history=history, max_new_tokens=1).usage for _ in range(2)]
    assert usage[0].computed_tokens == new, "the turn under anchored was not there"
    assert usage[1].computed_tokens < new, "and now it is"


def turns_in(pool: Pool) -> list[Resident]:
    return [entry for entry in pool._entries.values() if entry.key.level == LEVEL_QUERY]


def test_asking_the_same_twice_keeps_one_turn(random_braid: Braid, pool_of: PoolOf) -> None:
    context = compose(random_braid)
    context.ask(QUESTIONS[0], max_new_tokens=20)
    before = pool_of(random_braid).used_bytes
    context.ask(QUESTIONS[0], max_new_tokens=20)
    assert pool_of(random_braid).used_bytes == before


def test_a_turn_keeps_only_the_pages_that_it_fills_and_pads_them_with_zeros(
    random_checkpoint: Path, tmp_path: Path, page_bytes: int, pool_of: PoolOf
) -> None:
    options = {"device": "cpu", "dtype": "float32", "pool_bytes": 40 * page_bytes}
    with Braid(random_checkpoint, store=tmp_path, **options) as braid:  # type: ignore[arg-type]
        pool_of(braid).kv.fill_(float("nan"))
        context = compose(braid)
        whole = context.ask(QUESTIONS[0], max_new_tokens=40)
        context.ask(QUESTIONS[0], max_new_tokens=1000, stop=whole.text[10:14])
        pool = pool_of(braid)
        turns = turns_in(pool)
        assert len(turns) == 2
        for turn in turns:
            assert len(turn.pages) == pool.pages_for(turn.tokens)
            filled = turn.tokens - (len(turn.pages) - 1) * pool.page_size
            assert torch.all(pool.kv[:, :, turn.pages[-1], :, filled:] == 0.0)
            assert torch.all(pool.kv[:, :, turn.pages[-1], :, filled - 1].abs().sum((2, 3)) > 0.0)


def test_the_history_is_not_stored_and_goes_with_a_deleted_chunk(random_braid: Braid, pool_of: PoolOf) -> None:
    context = compose(random_braid)
    stored = random_braid.stats().entries
    talk(context, 2, max_new_tokens=10)
    assert random_braid.stats().entries == stored
    assert len(turns_in(pool_of(random_braid))) == 2
    stream = context.stream(QUESTIONS[3], max_new_tokens=10)
    next(stream)
    random_braid.chunks.delete(random_braid.register(TEXTS[1]))
    list(stream)  # ends after the chunk has gone: it is not kept either
    assert not turns_in(pool_of(random_braid))


def test_the_ids_of_an_unknown_history_are_those_of_its_text(
    random_braid: Braid, random_checkpoint: Path, layout: PromptLayout
) -> None:
    """They equal the chat template's own ids for the same messages."""
    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint)
    context = compose(random_braid)
    history = said("Which of them?", "Oslo.") + said(" And what about Rome?\n", "It is (one) too.\nYes")
    messages = [
        {"role": "system", "content": "You answer questions."},
        {"role": "user", "content": "".join(f"{text.strip()}\n" for text in TEXTS) + "Which of them?"},
        {"role": "assistant", "content": "Oslo."},
        {"role": "user", "content": "And what about Rome?"},
        {"role": "assistant", "content": "It is (one) too.\nYes"},
        {"role": "user", "content": "Why?"},
    ]
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert context.prompt_ids("Why?", history=history) == tuple(want)
    assert max(layout.answer_ids("<|im_end|>")) < 1019, "an answer's text is no control token"


def test_an_answers_own_ids_are_used_and_not_those_of_its_text(random_braid: Braid, layout: PromptLayout) -> None:
    context = compose(random_braid)
    answer = context.ask(QUESTIONS[0], max_new_tokens=30)
    assert layout.answer_ids(answer.text) != answer.token_ids, "a random model spells otherwise than the tokenizer"
    prompt = context.prompt_ids(QUESTIONS[1], history=said(QUESTIONS[0], f" {answer.text}\n"))
    assert prompt[len(answer.prompt_ids) :][:30] == answer.token_ids
    other = context.prompt_ids(QUESTIONS[1], history=said(QUESTIONS[0], "Something else."))
    assert other[len(answer.prompt_ids) :][:3] == layout.answer_ids("Something else.")[:3]


QWEN3_TEMPLATE = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
"""How Qwen3's own template treats past turns and thinking."""


def test_a_template_with_thinking_blocks(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [*said("Which?", "Oslo."), {"role": "user", "content": "Why?"}]
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with Braid(folder, store=tmp_path / "thinking", device="cpu", thinking=True) as braid:
        assert braid.compose([]).prompt_ids("Why?", history=said("Which?", "Oslo.")) == tuple(want)
    with Braid(folder, store=tmp_path / "store", device="cpu") as braid:
        context = braid.compose([])
        answer = context.ask("Which?", max_new_tokens=8)
        prompt = context.prompt_ids("Why?", history=said("Which?", answer.text))
        past = answer.prompt_ids + answer.token_ids
        assert prompt[: len(past)] == past, "the conversation as it was, its empty thinking blocks included"


OPEN = QWEN3_TEMPLATE.replace("assistant\\n' }}\n{%- if enable", "assistant\\n<think>\\n' }}\n{%- if enable")
"""A template that opens the thought itself, as that of Qwen3's thinking models."""
THOUGHT = "The user greets me.\n</think>\n\nHi there."


@pytest.mark.parametrize("template", [QWEN3_TEMPLATE, OPEN], ids=["the model opens", "the template opens"])
@pytest.mark.parametrize("answer", ["Hi there.", THOUGHT, f"<think>\n{THOUGHT}", "\u00ab</think>\u00bb <think>"])
def test_a_past_answer_that_is_known_by_its_text_is_laid_out_as_the_template_does(
    make_checkpoint: Callable[..., Path], template: str, answer: str
) -> None:
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(template)
    tokenizer, layout = AutoTokenizer.from_pretrained(folder), PromptLayout(folder, thinking=True)
    past = conversation([Turn("Hello?", answer)] * 2, layout, SpokenTurns())
    ids = layout.header_ids + past.turns[0] + past.turns[1] + past.opening + layout.question_ids("Why?", follows=True)
    messages = [*said("Hello?", answer), *said("Hello?", answer), {"role": "user", "content": "Why?"}]
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=True)
    if answer.endswith("<think>"):
        assert layout.decode(ids) == layout.decode(want), "a text can't open a thought"
        assert ids.count(1022) == want.count(1022) - 2
    else:
        assert ids == tuple(want)


def test_a_thought_that_the_template_shows_is_closed_by_a_control_token(make_checkpoint: Callable[..., Path]) -> None:
    """braid-tiny's template shows answers as they are. The marks of the thought at the start are those of the model."""
    layout, think, close = PromptLayout(make_checkpoint()), 1022, 1023
    ids = layout.answer_ids(f"<think>\n{THOUGHT} <think> </think>")
    assert ids[0] == think
    assert (ids.count(think), ids.count(close)) == (1, 1)
    assert layout.decode(ids) == f"<think>\n{THOUGHT} <think> </think>"
    assert think not in layout.answer_ids("<think> is how thoughts begin.")


def test_an_answer_cut_off_within_a_thought_does_not_leave_it_open(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(OPEN)
    layout, spoken, close = PromptLayout(folder, thinking=True), SpokenTurns(), 1023
    tail = layout.question_ids("Hello?")
    for ids, kept in (((5, 6, 7), False), ((5, close, 6, 7), True)):
        spoken.remember(tail, "text", Spoken(ids, 3))
        past = conversation([Turn("Hello?", "text")], layout, spoken)
        assert (past.turns[0] + past.opening == tail + ids + layout.turn_ids) == kept
        assert past.turns[0].count(1022) == kept


def test_a_template_that_moves_the_system_prompt_is_refused_with_a_history(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(
        "{%- set rules = messages[0].content if messages[0].role == 'system' else '' %}"
        "{%- for m in messages %}{%- if m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if loop.last %}{{- rules + '\\n' }}{%- endif %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    with Braid(folder, store=tmp_path / "store", device="cpu") as braid:
        context = braid.compose([braid.register_system("Be brief.")])
        assert context.prompt_ids("Well?")
        with pytest.raises(UnsupportedModelError, match=r"a conversation must stand .* Ask without history"):
            context.ask("Well?", history=said("Hello?", "Hi."))


@pytest.mark.parametrize(
    ("history", "says"),
    [
        ([{"role": "user", "content": "a"}], "ends with a user's message"),
        ([{"role": "assistant", "content": "a"}], "role of message 0 of history must be 'user'; got 'assistant'"),
        ([*said("a", "b"), {"role": "assistant", "content": "c"}], "role of message 2 .* must be 'user'"),
        ([{"role": "system", "content": "a"}, *said("a", "b")], "role of message 0 .* got 'system'"),
        ([{"role": "user", "text": "a"}, {"role": "assistant", "content": "b"}], "message 0 is not of that form"),
        ([{"role": "user", "content": "a", "name": "b"}], "message 0 is not of that form"),
        (
            [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}],
            "message 0 .* must be text; got a list",
        ),
        (["a", "b"], "message 0 is not of that form"),
        ("a", "got a str"),
        ({"role": "user", "content": "a"}, "got a dict"),
    ],
    ids=str,
)
def test_a_malformed_history(random_braid: Braid, history: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        random_braid.ask("Well?", chunks=[], history=history)  # type: ignore[arg-type]


def test_an_empty_message_and_one_too_long(random_braid: Braid) -> None:
    with pytest.raises(EmptyTextError, match="Message 0 of history"):
        random_braid.ask("Well?", chunks=[], history=said(" \n", "a"))
    silent = random_braid.compose([]).prompt_ids("Well?", history=said("a", ""))
    assert silent == random_braid.compose([]).prompt_ids("a") + silent[len(random_braid.compose([]).prompt_ids("a")) :]
    with pytest.raises(WindowExceededError, match="this history"):
        random_braid.ask("Well?", chunks=[], history=said("a", "word " * 3000))
    plain = random_braid.ask("Well?", chunks=[], max_new_tokens=5)
    assert random_braid.ask("Well?", chunks=[], max_new_tokens=5, history=[]).token_ids == plain.token_ids
