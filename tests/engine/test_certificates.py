"""Certificates in a store: which of them count, and what a later calibration changes."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from braidsdk import Braid, Chunk, Guided
from braidsdk.errors import InputError
from braidsdk.fidelity.measure import PASSAGE

NO_PROCESS = 2**22 + 1
"""No process has this number: Linux gives none above 2**22."""

RULES = "You answer questions from the documents."
TEXTS = [f"The capital of {land} is {city}." for land, city in (("Aistonia", "Flubarg"), ("Belmora", "Plonk"))]
ASKED = [f"What is the capital of {land}?" for land in ("Aistonia", "Belmora")]


def registered(braid: Braid) -> list[Chunk]:
    rules = braid.register_system(RULES)
    return [rules, *braid.register_many(TEXTS, anchor=rules, progress=False)]


def test_a_certificate_says_which_layers_were_measured(other: Callable[..., Braid]) -> None:
    """A later calibration does not change what `auto` takes."""
    with other() as braid:
        chunks = registered(braid)
        braid.fidelity(chunks, ASKED, ["anchored", "guided(0.9)"], max_new_tokens=4)
        braid._engine.certificates.keep_calibration(Guided(layers=(0,), near=2))
        context = braid.compose(chunks, mode="auto(0.97)")
        assert context.mode == "guided(0.9)"
        assert context.ask("Well?", max_new_tokens=1).fidelity.mode == "guided(0.9)"
        assert braid.compose(chunks, mode="guided(0.9)").mode == "guided(0.9, layers=0, near=2)"
        assert braid.compose(chunks, mode="guided(0.9, near=0)").mode == "guided(0.9, near=0)"
        with pytest.raises(InputError, match="must be one that was measured: exact, anchored; got 'isolated'"):
            braid.fidelity(chunks, ASKED, ["anchored"], max_new_tokens=4)["isolated"]


def test_certificates_of_unknown_modes_do_not_count(other: Callable[..., Braid]) -> None:
    with other() as braid:
        chunks = registered(braid)
        braid.fidelity(chunks, ASKED, ["anchored"], max_new_tokens=2)
        (found, *_) = braid._engine.certificates.all()
        braid._engine.certificates.keep([replace(found, mode="future(0.1)", budget=-1.0, top1=1.0)])
        assert braid.compose(chunks).mode in ("exact", "anchored")


def test_threads_that_keep_certificates_lose_none(other: Callable[..., Braid]) -> None:
    with other() as braid:
        kept = braid._engine.certificates
        braid.fidelity(registered(braid), ASKED, ["anchored"], max_new_tokens=2)
        (ours,) = (each for each in kept.all() if each.mode == "anchored")
        ranges = [replace(ours, fewest_chunks=count, most_chunks=count) for count in range(1, 9)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda each: kept.keep([each]), ranges))
        assert sorted(each.fewest_chunks for each in kept.all() if each.mode == "anchored") == list(range(1, 9))


def test_passages_that_somebody_registers_meanwhile_stay(other: Callable[..., Braid]) -> None:
    asked = [{"question": ASKED[0], "passages": [*TEXTS, "A third passage."]}]
    with other() as braid:
        rules = braid.register_system(RULES)

        def register(done: int, total: int) -> None:
            if done < total:
                return
            assert braid.chunks.count(level=1) == 1

        ask = type(braid._engine).run
        named: list[Chunk] = []

        def meanwhile(self: Any, request: Any) -> Any:
            if not named:
                named.append(braid.chunks.list(level=1)[0])
                braid.register(TEXTS[0], name="mine", metadata={"page": 3})
            return ask(self, request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(braid._engine), "run", meanwhile)
            braid.fidelity([rules], asked, ["anchored"], max_new_tokens=2, on_progress=register)
        assert named
        (mine,) = braid.chunks.list(level=1)
        assert (mine.name, mine.metadata) == ("mine", {"page": 3})


def test_passages_of_a_run_that_was_killed_go_with_the_next_one(other: Callable[..., Braid]) -> None:
    asked = [{"question": ASKED[0], "passages": TEXTS}]
    with other() as braid:
        rules = braid.register_system(RULES)
        gone, ours = {**PASSAGE, "process": NO_PROCESS}, {**PASSAGE, "process": os.getpid()}
        braid.register("Left by a run that was killed.", metadata=gone)
        braid.register("Named since.", metadata=gone, name="mine")
        braid.register("Of a run that goes on.", metadata=ours)
        braid.fidelity([rules], asked, ["anchored"], max_new_tokens=2)
        assert [chunk.text for chunk in braid.chunks.list(level=1)] == ["Named since.", "Of a run that goes on."]
