"""A real model gives the ids that transformers gives: 100 questions over composed passages.

This runs where BRAID_REAL_MODEL names a checkpoint's folder or a GGUF file. `pytest -s` shows how many answers hold the
right words in each mode.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from braidsdk import Answer, Braid, Context

MODEL = Path(os.environ.get("BRAID_REAL_MODEL", ""))
GGUF: dict[str, Any] = {"gguf_file": MODEL.name} if MODEL.is_file() else {}
FOLDER = MODEL.parent if GGUF else MODEL

PASSAGES = json.loads((Path(__file__).parent / "data" / "questions.json").read_text(encoding="utf-8"))
WORDS = [each["answer"] for passage in PASSAGES for each in passage["questions"]]
SYSTEM = "Answer in a few words, from the documents."
NEW_TOKENS = 16


def real(test: Callable[..., None]) -> Callable[..., None]:
    """For a real model, which may have something to warn of."""
    reason = "BRAID_REAL_MODEL must name a checkpoint's folder or a GGUF file"
    test = pytest.mark.skipif(not MODEL.name, reason=reason)(test)
    return pytest.mark.real(pytest.mark.filterwarnings("default")(test))


@pytest.fixture(scope="module")
def braid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Braid]:
    with Braid(MODEL, store=tmp_path_factory.mktemp("store"), device="cpu", dtype="float32") as opened:
        yield opened


@pytest.fixture(scope="module")
def peer() -> PreTrainedModel:
    """The model in transformers, in float32: in fewer bits two ids may have the same logit."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, **GGUF).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, **GGUF)


def composed(braid: Braid, mode: str) -> list[tuple[Context, str, str]]:
    """Contexts of the passage that holds the answer and two others, in an order drawn by chance; the text of each; and
    questions."""
    system = braid.register_system(SYSTEM)
    chunks = braid.register_many([passage["text"] for passage in PASSAGES], anchor=system, progress=False)
    chance = random.Random(0)
    made = []
    for right, passage in enumerate(PASSAGES):
        others = chance.sample([other for other in range(len(PASSAGES)) if other != right], 2)
        order = chance.sample([right, *others], 3)
        context = braid.compose([system, *(chunks[one] for one in order)], mode=mode)
        text = "".join(f"{PASSAGES[one]['text']}\n" for one in order)
        made += [(context, text, each["question"]) for each in passage["questions"]]
    return made


def ask(braid: Braid, mode: str) -> list[Answer]:
    started = perf_counter()
    asked = [(context, question) for context, _, question in composed(braid, mode)]
    answers = braid.ask_many(asked, max_new_tokens=NEW_TOKENS)
    held = sum(words.lower() in answer.text.lower() for words, answer in zip(WORDS, answers, strict=True))
    seconds = perf_counter() - started
    print(f"\n{mode}: {held} of {len(answers)} answers hold the right words, in {seconds:.0f} s")  # noqa: T201
    return answers


@torch.inference_mode()
def generate(peer: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: Answer) -> tuple[int, ...]:
    """transformers' ids for an answer's prompt. They may end where Braid's do, at the chat template's own end."""
    prompt = torch.tensor([answer.prompt_ids])
    ends = peer.generation_config.eos_token_id or []
    ends = list(ends) if isinstance(ends, list) else [ends]
    ends += {*answer.token_ids[-1:]} & {*tokenizer.all_special_ids}
    made = peer.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=0,
    )
    return tuple(made[0, prompt.shape[1] :].tolist())


@torch.inference_mode()
def difference(peer: PreTrainedModel, answer: Answer, want: tuple[int, ...]) -> str:
    """Where two answers part, and transformers' logits of both ids there: a near tie, or a fault?"""
    got = answer.token_ids
    apart = next((place for place, ids in enumerate(zip(got, want, strict=False)) if ids[0] != ids[1]), None)
    if apart is None:
        return f"{answer.text!r} has {len(got)} tokens instead of {len(want)}"
    logits = peer(torch.tensor([[*answer.prompt_ids, *want[:apart]]])).logits[0, -1]
    ours, theirs = (f"{ids[apart]} ({logits[ids[apart]]:.6f})" for ids in (got, want))
    return f"{answer.text!r}: token {apart} is {ours} instead of {theirs}"


def test_the_passages_hold_the_answers_to_100_questions() -> None:
    for passage in PASSAGES:
        assert all(each["answer"].lower() in passage["text"].lower() for each in passage["questions"])
    assert len(WORDS) == 100


@real
def test_prompts_are_those_of_the_chat_template(braid: Braid, tokenizer: PreTrainedTokenizerBase) -> None:
    for context, text, question in composed(braid, "exact"):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text + question}]
        want = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
        )
        assert context.prompt_ids(question) == tuple(want)


@real
def test_exact_answers_are_those_of_generate(
    braid: Braid, peer: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = ask(braid, "exact")
    started = perf_counter()
    wanted = [generate(peer, tokenizer, answer) for answer in answers]
    print(f"generate of transformers: {perf_counter() - started:.0f} s")  # noqa: T201
    differ = [
        difference(peer, answer, want) for answer, want in zip(answers, wanted, strict=True) if answer.token_ids != want
    ]
    for mode in ("anchored", "isolated"):
        ask(braid, mode)  # shown only: their answers may be others
    assert not differ, "\n".join([f"{len(differ)} of 100 differ", *differ])
