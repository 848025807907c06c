"""How tokens are chosen: against transformers' processors, per request; and what ends an answer."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3ForCausalLM

from braidsdk import Braid, Context
from braidsdk.cache.pool import Pool
from braidsdk.engine import runner
from braidsdk.errors import InputError, NumericsError
from braidsdk.kernels.sample.reference import kept_reference, scored
from braidsdk.models.base import GenerationDefaults
from braidsdk.prompt.layout import PromptLayout
from braidsdk.prompt.stop_strings import StopStrings


@pytest.fixture(scope="module")
def peer(random_checkpoint: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def context(random_braid: Braid) -> Context:
    return random_braid.compose([random_braid.register("A document about something.")], mode="exact")


# What can be drawn


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 1.5, "repetition_penalty": 1.4, "top_k": 300, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 3.0, "repetition_penalty": 0.7, "top_p": 0.5, "min_p": 0.3},
        {"temperature": 1.0, "top_k": 5000, "top_p": 1e-20},
    ],
    ids=str,
)
def test_what_can_be_drawn_is_what_transformers_leaves(peer: Qwen3ForCausalLM, options: dict[str, float]) -> None:
    prompt = torch.arange(7, 700, 3)[None]
    torch.manual_seed(0)
    out = peer.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_new_tokens=6,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=1019,
        **{"top_k": 0, **options},
    )
    penalty, top_k = options.get("repetition_penalty", 1.0), int(options.get("top_k", 0))
    for step, (raw, want) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen = torch.zeros(1024, dtype=torch.bool)
        seen[out.sequences[0, : prompt.shape[1] + step]] = True
        scores = scored(raw[0], seen, penalty, options["temperature"])
        kept = kept_reference(scores, top_k, options.get("top_p", 1.0), options.get("min_p", 0.0))
        torch.testing.assert_close(scores.masked_fill(~kept, -math.inf), want[0], rtol=1e-6, atol=1e-6)


# One request


def test_the_answer_is_greedy_unless_a_temperature_is_given(context: Context) -> None:
    greedy = context.ask("Well?", max_new_tokens=12).token_ids
    assert context.ask("Well?", max_new_tokens=12, temperature=0, top_p=0.5).token_ids == greedy
    assert context.ask("Well?", max_new_tokens=12, temperature=3.0, top_k=1).token_ids == greedy
    assert context.ask("Well?", max_new_tokens=12, temperature=1e-300).token_ids == greedy
    beyond = {"temperature": 2.0, "seed": 3, "max_new_tokens": 5}
    assert context.ask("Well?", top_k=2**63, **beyond).token_ids == context.ask("Well?", top_k=0, **beyond).token_ids
    assert context.ask("Well?", max_new_tokens=12, temperature=3.0, seed=1).token_ids != greedy


def test_a_seed_gives_one_answer_whatever_else_runs(context: Context) -> None:
    def ask(seed: int | None) -> tuple[int, ...]:
        return context.ask("Well?", max_new_tokens=12, temperature=2.0, seed=seed).token_ids

    state = torch.get_rng_state()
    first = ask(1)
    assert ask(1) == first
    assert ask(2) != first
    assert ask(None) != ask(None)
    streams = [context.stream("Well?", max_new_tokens=12, temperature=2.0, seed=seed) for seed in (1, 2)]
    for _ in range(14):
        for stream in streams:
            next(stream, None)
    assert streams[0].answer.token_ids == first
    assert torch.equal(torch.get_rng_state(), state), "the global generator is neither read nor changed"


def test_a_checkpoint_says_what_is_not_given(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1, "repetition_penalty": 1.5, "top_p": 0.9}))
    with Braid(folder, store=tmp_path / "store", device="cpu") as braid:
        context = braid.compose([])
        greedy = context.ask("Well?", max_new_tokens=30).token_ids
        assert context.ask("Well?", max_new_tokens=30, temperature=5.0).token_ids == greedy
        assert context.ask("Well?", max_new_tokens=30, temperature=5.0, top_k=0).token_ids != greedy
        assert context.ask("Well?", max_new_tokens=30, repetition_penalty=1.0).token_ids != greedy
    assert GenerationDefaults().top_k == 50, "transformers' own default"


def test_greedy_with_a_repetition_penalty_equals_generate(context: Context, peer: Qwen3ForCausalLM) -> None:
    answer = context.ask("Well?", max_new_tokens=40, repetition_penalty=1.3)
    prompt = torch.tensor([answer.prompt_ids])
    want = peer.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.3,
        pad_token_id=1019,
    )
    assert answer.token_ids == tuple(want[0, prompt.shape[1] :].tolist())
    assert answer.token_ids != context.ask("Well?", max_new_tokens=40).token_ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number at least 0; got a str"),
        ({"top_p": 0.5}, "temperature must be above 0 if top_p is given"),
        ({"temperature": 1, "top_p": 0}, "top_p must be above 0 and at most 1"),
        ({"temperature": 1, "top_p": 1.01}, "top_p"),
        ({"temperature": 1, "top_k": -1}, "top_k must be at least 0"),
        ({"temperature": 1, "top_k": 2.5}, "top_k must be an integer"),
        ({"temperature": 1, "min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be at least 0.01 and at most 1e\+06; got 0"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed must be an integer .* got a bool"),
        ({"stop": ""}, "stop .* an empty one"),
        ({"stop": ["a", 3]}, "stop .* got a int"),
        ({"stop_ids": [1024]}, "stop_ids must be at least 0 and below 1,024; got 1024"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used(context: Context, options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        context.stream("Well?", **options)  # type: ignore[arg-type]


def test_an_unknown_keyword_is_a_type_error(context: Context) -> None:
    with pytest.raises(TypeError, match="unexpected keyword 'temprature'; expected max_new_tokens, temperature"):
        context.ask("Well?", temprature=1.0)  # type: ignore[call-arg]


# What ends an answer


def test_a_stop_string_ends_the_answer_before_it(
    context: Context, random_braid: Braid, pool_of: Callable[[Braid], Pool]
) -> None:
    whole = context.ask("Well?", max_new_tokens=40)
    for size in (1, 3, 7):
        middle = len(whole.text) // 2
        stop = whole.text[middle : middle + size]
        stream = context.stream("Well?", max_new_tokens=40, stop=["never there", stop])
        pieces = list(stream)
        answer = stream.answer
        assert answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
        assert (answer.finish_reason, answer.stop_string) == ("stop", stop)
        assert len(answer.token_ids) < len(whole.token_ids), "generation ended there"
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert answer.usage.completion_tokens == len(answer.token_ids)
    again = context.ask("Well?", max_new_tokens=40, stop="never there")
    assert (again.text, again.finish_reason) == (whole.text, whole.finish_reason), "held back, and given at the end"
    assert again.stop_string is None
    pool = pool_of(random_braid)
    assert pool.room == pool.capacity_pages


PIECES = st.lists(st.text("abc", max_size=4), max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    want, found = text, None
    if ends:
        found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        want = text[: ends[0] - len(found)]
    watch = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += watch.feed(piece)
        assert want.startswith(shown), "a part of a stop string was shown"
    assert shown + watch.flush() == want
    assert watch.found == found


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    watch = StopStrings(["</answer>"])
    assert watch.feed("one < two") == "one < two"
    assert watch.feed(" </ans") == " "
    assert watch.feed("wers") == "</answers"


def test_a_stop_id_ends_the_answer_as_the_models_own_end_does(
    context: Context, random_checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    whole = context.ask("Well?", max_new_tokens=40)
    stop = whole.token_ids[11]
    answer = context.ask("Well?", max_new_tokens=40, stop_ids=[stop, 3])
    end = whole.token_ids.index(stop)
    assert answer.token_ids == whole.token_ids[: end + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == PromptLayout(random_checkpoint).decode(whole.token_ids[:end])
    folder = make_checkpoint(eos_token_id=stop)
    with Braid(folder, store=tmp_path / "other", device="cpu", dtype="float32") as braid:
        own = braid.compose([braid.register("A document about something.")], mode="exact")
        ended = own.ask("Well?", max_new_tokens=40, stop_ids=[3])
    assert (ended.token_ids, ended.text, ended.finish_reason) == (answer.token_ids, answer.text, "stop")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 1}, {"repetition_penalty": 1.2}], ids=str)
def test_logits_that_are_not_finite_are_a_typed_error(
    context: Context,
    random_braid: Braid,
    pool_of: Callable[[Braid], Pool],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, float],
    value: float,
) -> None:
    before = context.ask("Well?", max_new_tokens=9)
    idle = pool_of(random_braid).room
    honest, calls = runner.forward, []

    def broken(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        logits = honest(*arguments)
        return logits.index_fill(-1, torch.tensor([5]), value) if len(calls) == 4 else logits

    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", broken)
        with pytest.raises(NumericsError, match="token 4 of the answer"):
            context.ask("Well?", max_new_tokens=9, **options)  # type: ignore[arg-type]
    assert pool_of(random_braid).room == idle
    assert context.ask("Well?", max_new_tokens=9).token_ids == before.token_ids
