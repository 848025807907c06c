"""Texts that are refused or deleted do not stay in this process's memory."""

import gc
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from braidsdk import Braid
from braidsdk.errors import InputError, NameTakenError, WindowExceededError
from braidsdk.testing import FakeBraid


def held(secret: str) -> list[str]:
    """What holds a text with the secret, among all that Python's collector knows."""
    gc.collect()
    found = []
    for each in gc.get_objects():
        kind = type(each)  # others may load what they hold when they are asked
        if kind in (dict, OrderedDict):
            inner = [*each, *each.values()]
        elif kind in (list, tuple, set):
            inner = list(each)
        elif kind is FrameType and each.f_back is None:  # of an error that is kept; others run
            inner = list(each.f_locals.values())
        else:
            continue
        found += [f"{kind} of {len(inner)}" for one in inner if type(one) is str and secret in one]
    return found


def secret_of(name: str) -> str:
    """Not a constant of the code, which would be found too."""
    return "-".join(["marmalade", name, "zebra"])


def refuse(braid: Braid, register: Callable[[str], Any], error: type[InputError], name: str, text: str) -> None:
    with pytest.raises(error):
        register(f"{text} {secret_of(name)}")
    assert held(secret_of(name)) == []


def test_a_refused_text_is_not_remembered(tmp_path: Any) -> None:
    with FakeBraid({}, store=tmp_path) as braid:
        braid.register("Another text.", name="taken")
        long = "word " * 2_000_000
        refuse(braid, lambda text: braid.register(text, name="taken"), NameTakenError, "name", "Some text.")
        refuse(braid, lambda text: braid.register(text, metadata={"x": object()}), InputError, "metadata", "Some text.")
        refuse(braid, braid.register, WindowExceededError, "window", long)


def test_a_skipped_text_is_not_remembered_though_its_error_is_kept(tmp_path: Any) -> None:
    with FakeBraid({}, store=tmp_path) as braid:
        braid.register("Another text.", name="taken")

        def register() -> Any:
            texts = [f"Some {secret_of('skipped')} text.", "word " * 2_000_000 + secret_of("long")]
            return braid.register_many(texts, names=["taken", None], on_error="skip", progress=False)

        registered = register()
        assert [type(each.error) for each in registered.skipped] == [NameTakenError, WindowExceededError]
        assert held(secret_of("skipped")) == held(secret_of("long")) == []


def test_a_deleted_text_is_not_remembered(tmp_path: Any) -> None:
    with FakeBraid(lambda *_: "yes", store=tmp_path) as braid:
        rules = braid.register_system("You answer.")

        def use() -> None:
            chunk = braid.register(f"Some {secret_of('deleted')} text.", anchor=rules, name="it")
            braid.ask("Well?", chunks=[rules, chunk])
            braid.chunks.delete("it")

        use()
        assert [row.name for row in braid.chunks.list()] == [None]
        assert held(secret_of("deleted")) == []
