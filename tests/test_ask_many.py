"""Many requests together give the same answers as each of them alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from braidsdk import Braid, Context
from braidsdk.engine import runner
from braidsdk.errors import InputError, PoolFullError
from braidsdk.prompt.layout import PromptLayout

TEXTS = ["Rivers run to the sea.", "Mountains stay where they are.", "Clouds come and go, and some of them rain."]


@pytest.fixture
def contexts(random_braid: Braid) -> list[Context]:
    rules = random_braid.register_system("Answer.")
    docs = random_braid.register_many(TEXTS, anchor=rules)
    orders = ([0, 1, 2], [2, 0], [1], [2, 1, 0, 2], [])
    return [random_braid.compose([rules, *(docs[i] for i in order)]) for order in orders]


def test_answers_are_those_of_single_calls(random_braid: Braid, contexts: list[Context]) -> None:
    requests = [(context, f"Question {index}?" + " Why?" * index) for index, context in enumerate(contexts)]
    alone = [context.ask(question, max_new_tokens=20) for context, question in requests]
    together = random_braid.ask_many(requests, max_new_tokens=20)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.prompt_ids for each in together] == [each.prompt_ids for each in alone]


def test_answers_end_by_themselves(random_braid: Braid, contexts: list[Context]) -> None:
    requests = [(context, "Well?") for context in contexts]
    alone = [context.ask("Well?", max_new_tokens=30) for context in contexts]
    stops = [each.token_ids[index + 3] for index, each in enumerate(alone)]
    together = random_braid.ask_many(requests, max_new_tokens=30, stop_ids=stops)
    single = [context.ask("Well?", max_new_tokens=30, stop_ids=stops) for context in contexts]
    assert [each.token_ids for each in together] == [each.token_ids for each in single]
    assert len({len(each.token_ids) for each in together}) > 1


def test_requests_go_on_together_whatever_text_their_tokens_have(
    random_braid: Braid, contexts: list[Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = SimpleNamespace(feed=lambda token_id: "", flush=lambda: "")
    monkeypatch.setattr(PromptLayout, "detokenizer", lambda _: silent)
    for context in contexts:
        context.prepare()
    passes = []
    monkeypatch.setattr(runner, "forward", lambda *args, forward=runner.forward: passes.append(1) or forward(*args))
    random_braid.ask_many([(context, "Well?") for context in contexts], max_new_tokens=12)
    assert 12 <= len(passes) <= len(contexts) + 11


def test_sampled_answers_depend_on_their_seed_alone(random_braid: Braid, contexts: list[Context]) -> None:
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 5}
    alone = [context.ask("Well?", **options).token_ids for context in contexts]
    together = random_braid.ask_many([(context, "Well?") for context in contexts], **options)
    assert [each.token_ids for each in together] == alone


def test_finished_requests_make_room(random_checkpoint: Path, tmp_path: Path) -> None:
    page = 3 * 2 * 2 * 64 * 32 * 4
    with Braid(random_checkpoint, store=tmp_path, dtype="float32", device="cpu", pool_bytes=8 * page) as small:
        docs = small.register_many(TEXTS)
        contexts = [small.compose([doc]) for doc in docs] * 4
        answers = small.ask_many([(context, "Well?") for context in contexts], max_new_tokens=70)
        single = [small.compose([doc]).ask("Well?", max_new_tokens=70).token_ids for doc in docs]
        assert [each.token_ids for each in answers] == single * 4
        with pytest.raises(PoolFullError, match="limit"):
            small.ask_many([(contexts[0], "Well?"), (contexts[1], "Well?")], max_new_tokens=800)
        assert small.compose([docs[0]]).ask("Well?", max_new_tokens=70).token_ids == single[0]


def test_bad_requests_are_refused(random_braid: Braid, contexts: list[Context], tmp_path: Path) -> None:
    assert random_braid.ask_many([]) == []
    with pytest.raises(InputError, match="pairs"):
        random_braid.ask_many(["What?"])  # type: ignore[list-item]
    with pytest.raises(InputError):
        random_braid.ask_many([(contexts[0], "Well?"), (contexts[1], " ")])
    with (
        Braid("braid-tiny", store=tmp_path / "other", device="cpu") as other,
        pytest.raises(InputError, match="another"),
    ):
        other.ask_many([(contexts[0], "Well?")])
