"""braid-tiny warns, once, when it is given texts that are not of its invented world; and never otherwise."""

import random
import warnings
from pathlib import Path

import pytest

from braidsdk import Braid
from braidsdk.cli.demo import load_samples
from braidsdk.models.tiny import outside
from braidsdk.models.tiny.outside import OutsideWorldWarning, is_of_the_world
from braidsdk.models.tiny.world import make_sample
from braidsdk.testing import FakeBraid

PROSE = [
    "Refunds are made within 30 days of purchase. Contact support with your order number.",
    "The committee met on Tuesday to discuss the annual budget and its consequences for schools.",
    "pip install requests\nimport requests\nrequests.get(url)",
    "Der Ausschuss tagte am Dienstag und beriet über den Haushalt.",
    "天気がいいから、散歩しましょう。",
    "TERMS AND CONDITIONS APPLY TO ALL ORDERS",
    "42 1999 3.14",
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not warned yet."""
    monkeypatch.setattr(outside, "_warned", False)


@pytest.mark.parametrize("text", PROSE, ids=lambda text: ascii(text[:20]))
def test_prose_is_not_of_the_world(text: str) -> None:
    assert not is_of_the_world(text)


def test_every_text_of_the_world_is_of_it() -> None:
    rng = random.Random(5)
    for split in ("train", "test"):
        for _ in range(300):
            for text in make_sample(rng, split, documents=3, kinds=["alias"], clauses=0.5).documents:
                assert is_of_the_world(text), text


def test_the_samples_and_the_readmes_texts_are_of_it() -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    assert all(map(is_of_the_world, load_samples().documents.values()))
    for text in ("The capital of Aistonia is Flubarg.", "The capital of Belmora is Plonk."):
        assert text in readme
        assert is_of_the_world(text)


def test_braid_tiny_warns_once_and_names_a_real_model(tiny: Braid) -> None:
    with pytest.warns(OutsideWorldWarning, match=r"its own invented world only.*Qwen/Qwen3-0\.6B") as caught:
        tiny.register_many(["The capital of Aistonia is Flubarg.", PROSE[0]], progress=False)
    assert caught[0].filename == __file__, "it points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.register(PROSE[1])


def test_braid_tiny_does_not_warn_of_its_own_world_nor_of_a_system_prompt(tiny: Braid) -> None:
    tiny.register_many(list(load_samples().documents.values()), progress=False)
    tiny.register_system(PROSE[0])


def test_another_model_does_not_warn(random_braid: Braid) -> None:
    random_braid.register(PROSE[0])
    with FakeBraid() as fake:
        fake.register(PROSE[0])
