"""The public fakes, used as an application's own tests would use them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from braidsdk import Braid
from braidsdk.errors import InputError, StorePathError
from braidsdk.testing import ANSWER, FakeBraid

RULES = "Answer from the documents."


class Bot:
    """An application: answers questions over a folder of texts."""

    def __init__(self, braid: Braid, texts: list[str]) -> None:
        self.braid = braid
        self.rules = braid.register_system(RULES)
        self.documents = braid.register_many(texts, anchor=self.rules, progress=False)

    def answer(self, question: str) -> str:
        return self.braid.ask(question, chunks=[self.rules, *self.documents]).text


@pytest.fixture
def braid() -> Iterator[FakeBraid]:
    with FakeBraid({"How long?": "30 days.", "Größe?": "Zwölf 12 📏"}) as opened:
        yield opened


def test_a_bot_answers(braid: FakeBraid) -> None:
    bot = Bot(braid, ["Refunds are made within 30 days.", "We open at nine."])
    assert bot.answer("How long?") == "30 days."
    assert bot.answer("Größe?") == "Zwölf 12 📏"
    assert isinstance(braid, Braid)


def test_only_what_was_composed_is_seen() -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []

    def answer(question: str, documents: tuple[str, ...]) -> str:
        seen.append((question, documents))
        return " | ".join(documents)

    with FakeBraid(answer) as braid:
        bot = Bot(braid, ["one", "two"])
        assert bot.answer("Well?") == f"{RULES} | one | two"
        assert seen == [("Well?", (RULES, "one", "two"))], "asked once per answer"
        swapped = braid.compose([bot.documents[1], bot.documents[0]], mode="isolated")
        assert swapped.ask("Well?").text == "two | one"
        assert braid.compose([]).ask("Well?").text == ""


def test_usage_explain_and_history_are_the_real_ones(braid: FakeBraid) -> None:
    rules = braid.register_system(RULES)
    document = braid.register("one")
    context = braid.compose([rules, document])
    assert [row.hit for row in context.explain().chunks] == [True, False]
    answer = context.ask("How long?")
    assert answer.finish_reason == "stop"
    assert answer.usage.cached_tokens == len(rules.token_ids)
    assert answer.usage.completion_tokens == len("30 days.") + 1
    turns = [{"role": "user", "content": "How long?"}, {"role": "assistant", "content": answer.text}]
    again = context.ask("Größe?", history=turns)
    assert again.text == "Zwölf 12 📏"
    assert again.usage.cached_tokens == len(answer.prompt_ids) + len(answer.token_ids) - 1
    stream = context.stream("Größe?", max_new_tokens=5)
    assert "".join(stream) == "Zwöl"
    assert stream.answer.finish_reason == "length"
    assert context.ask("How long?", stop="day").text == "30 "
    assert context.ask("How long?", temperature=1.0, seed=3).text == "30 days."


def test_pieces_never_split_a_character(braid: FakeBraid) -> None:
    pieces = list(braid.stream("Größe?", chunks=[]))
    assert "".join(pieces) == "Zwölf 12 📏"
    assert all(len(piece) == 1 for piece in pieces)


def test_control_tokens_in_texts_are_plain_characters() -> None:
    with FakeBraid(lambda _, documents: documents[0]) as braid:
        assert braid.ask("x", chunks=[braid.register("<|im_end|>")]).text == "<|im_end|>"


def test_a_question_without_an_answer_is_named(braid: FakeBraid) -> None:
    with pytest.raises(InputError, match=r"an answer to 'How longg\?'.*Did you mean 'How long\?'"):
        braid.ask("How longg?", chunks=[])
    assert braid.ask("How long?", chunks=[]).text == "30 days.", "it goes on"
    with FakeBraid() as any_question:
        assert any_question.ask("What?", chunks=[]).text == ANSWER


def test_the_store_is_temporary_unless_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with FakeBraid() as braid:
        braid.register("one")
        (folder,) = tmp_path.glob("braid-fake-*")
        with FakeBraid() as other:
            assert len(other.chunks) == 0
    assert not folder.exists()
    braid.close()
    for _ in range(2):
        with FakeBraid(store=tmp_path / "kept") as kept:
            rules = kept.register_system(RULES)
            hit = kept.compose([rules]).explain().chunks[0]
    assert hit.where == "store"
    (tmp_path / "file").write_text("")
    with pytest.raises(StorePathError):
        FakeBraid(store=tmp_path / "file")


def test_it_opens_without_a_checkpoint_and_does_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braidsdk.braid.find_checkpoint", lambda *_: pytest.fail("it looked for a checkpoint"))
    monkeypatch.setattr("braidsdk.braid.load_model", lambda *_: pytest.fail("it loaded a model"))
    with FakeBraid() as braid:
        assert braid.stats().pool_used_bytes < 1_000_000


def test_the_modules_own_example_passes(tmp_path: Path) -> None:
    import braidsdk.testing

    assert braidsdk.testing.__doc__
    example = [line[4:] for line in braidsdk.testing.__doc__.splitlines() if line.startswith("    ")]
    (tmp_path / "example.py").write_text("\n".join([*example, "", "test_the_bot_answers()"]))
    subprocess.run([sys.executable, "-W", "error", str(tmp_path / "example.py")], check=True)


FORK = """
import os, sys
from pathlib import Path
from braidsdk.testing import FakeBraid

fake = FakeBraid()
folder = Path(repr(fake).split("store=")[1].strip("')"))
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    assert folder.is_dir()
    fake.close()
    assert not folder.exists()
else:
    fake.close()
"""


def test_a_fork_does_not_remove_the_store_of_its_parent() -> None:
    """Neither by closing it nor at its exit."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
