"""Someone in one namespace guesses what another one holds, by what calls return and by how long they take."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from random import Random
from time import perf_counter_ns
from typing import Any

import numpy as np
import pytest

from braidsdk import Braid, Chunk
from braidsdk.compose.modes import compose
from braidsdk.engine.engine import Engine
from braidsdk.errors import BraidError
from braidsdk.store import ChunkStore, NewChunk, chunk_id

RULES = "You answer from the documents."
TOKENS = 8
"""Of a guess, such as a PIN in a known sentence."""

AT_MOST = 0.55
"""The area under the ROC curve of "A has it" against "A has it not" by a call's time; 0.5 tells nothing."""


class Attacker:
    """A Braid in namespace B, on a store in which A has half of the guesses with their entries."""

    def __init__(self, opened: Callable[..., Braid], engine_of: Callable[[Braid], Engine], count: int) -> None:
        with opened(namespace="A") as braid:
            rules = braid.register_system(RULES)
            self.guesses = list(self._guesses(braid, 2 * count))
            Random(1).shuffle(self.guesses)
            self.held = set(self.guesses[:count])
            braid.register_many(self.guesses[:count], anchor=rules, progress=False)
        self.braid = opened(namespace="B")
        self.rules = self.braid.register_system(RULES)
        self.own = self.braid.register_many(["Some text of my own.", "Another one."], anchor=self.rules, progress=False)
        self.engine = engine_of(self.braid)
        self.store: ChunkStore = self.engine.store
        Random(2).shuffle(self.guesses)

    @staticmethod
    def _guesses(braid: Braid, count: int) -> Iterator[str]:
        """Texts of as many tokens."""
        random, seen = Random(3), set()
        while len(seen) < count:
            text = "".join(random.choices("bcdfghjklmnpqrstvwxz", k=TOKENS - 2))
            if text not in seen and braid.count_tokens(text) == TOKENS - 1:  # a newline follows
                seen.add(text)
                yield text

    def key(self, guess: str) -> Any:
        """The key of the entry that B would compute."""
        layout = self.engine.layout
        chunk = Chunk(chunk_id("B", 1, guess), "B", 1, guess, _encode=layout.chunk_ids)
        return self.engine.keys(compose([self.rules, chunk], layout=layout))[-1]

    def calls(self, guess: str) -> dict[str, Callable[[], Any]]:
        """What B can ask: about its own entry of the text, and about the id that the text has in A."""
        theirs, key, store = chunk_id("A", 1, guess), self.key(guess), self.store
        return {
            "plan": lambda: self.braid.estimate([guess], anchor=self.rules),
            "look_up": lambda: store.look_up([key]),
            "explain": lambda: store.explain([key]),
            "find": lambda: store.find_named("B", [theirs]),
            "known": lambda: store.known_chunks("B", [theirs]),
            "list after": lambda: store.list_chunks("B", after=theirs),
        }

    def rarer(self, guess: str) -> dict[str, Callable[[], Any]]:
        """What writes, or takes long."""
        theirs, store = chunk_id("A", 1, guess), self.store
        return {
            "compose": lambda: self.braid.compose([self.rules, theirs]),
            "ask for a key of an id": lambda: store.look_up([self.key(guess)]),
            "find by id": lambda: (store.find_chunk("B", theirs), store.find_chunks("B", [theirs])),
            "entries": lambda: store.entries_of("B", theirs),
            "update": lambda: store.update_chunk("B", theirs, metadata={"a": 1}),
            "delete": lambda: store.delete_chunks("B", [theirs]),
            "stats": lambda: store.stats("B"),
            "count": lambda: (store.count_chunks("B", name=guess), store.close_names("B", guess)),
            "register": lambda: self.register(guess),
        }

    def register(self, guess: str) -> Any:
        row = self.store.add_chunks([NewChunk("B", 1, guess)])[0]
        return row.text == guess, self.store.entries_of("B", row.id), self.store.delete_chunk("B", row.id)

    def seen(self, guess: str) -> dict[str, str]:
        """Everything that calls show, but for the guess itself and the disk's free space."""
        shown = {}
        for name, call in (self.calls(guess) | self.rarer(guess)).items():
            try:
                found = repr(call())
            except BraidError as error:
                found = f"{type(error).__name__}: {error}"
            shown[name] = re.sub(r"[0-9a-f]{32}|free_disk_bytes=\d+", "...", found.replace(guess, "..."))
        return shown


def told(attacker: Attacker) -> list[str]:
    """The calls that show something else where A has the guess."""
    shown: dict[str, dict[bool, set[str]]] = defaultdict(lambda: {True: set(), False: set()})
    for guess in attacker.guesses:
        for name, found in attacker.seen(guess).items():
            shown[name][guess in attacker.held].add(found)
    return [f"{name}: {both}" for name, both in shown.items() if len(both[True] | both[False]) > 1]


@pytest.fixture
def attacker(
    other: Callable[..., Braid], engine_of: Callable[[Braid], Engine], request: pytest.FixtureRequest
) -> Iterator[Attacker]:
    made = Attacker(other, engine_of, request.param)
    with made.braid:
        yield made


@pytest.mark.parametrize("attacker", [15], indirect=True)
def test_nothing_that_is_shown_tells_what_another_namespace_has(attacker: Attacker) -> None:
    assert told(attacker) == []
    with ChunkStore(attacker.store.path) as store:
        assert store.stats("A").chunks == 16, "nothing of it was changed"


@pytest.mark.campaign
@pytest.mark.parametrize("attacker", [500], indirect=True)
def test_nothing_that_is_shown_tells_which_of_many_guesses_another_namespace_has(
    attacker: Attacker, counted: Callable[..., None]
) -> None:
    wrong = told(attacker)
    counted("guesses of 8 tokens from another namespace, by all that calls show", 1000, wrong=len(wrong))
    assert wrong == []


def times(attacker: Attacker, rounds: int) -> dict[str, dict[str, float]]:
    """Of each call and guess, the median time. Calls and guesses take turns, in another order each round."""
    random = Random(4)
    measured: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    calls = {guess: attacker.calls(guess) for guess in attacker.guesses}
    for _ in range(rounds):
        for guess in random.sample(attacker.guesses, len(attacker.guesses)):
            for name, call in random.sample([*calls[guess].items()], len(calls[guess])):
                started = perf_counter_ns()
                call()
                measured[name][guess].append(perf_counter_ns() - started)
    return {name: {guess: float(np.median(each)) for guess, each in by.items()} for name, by in measured.items()}


def area(held: np.ndarray, free: np.ndarray) -> float:
    """The area under the ROC curve, whichever of the two takes longer: the probability that one takes longer than the
    other (Mann and Whitney)."""
    both = np.sort(free)
    above = np.searchsorted(both, held, "left") + np.searchsorted(both, held, "right")
    found = float(above.mean() / 2 / len(free))
    return max(found, 1 - found)


@pytest.mark.campaign
@pytest.mark.parametrize("attacker", [1500], indirect=True)
def test_times_do_not_tell_what_another_namespace_has(attacker: Attacker, counted: Callable[..., None]) -> None:
    """A measured statistic, not a bound on time: both kinds of guesses are measured in turns on the same machine."""
    random, areas = np.random.default_rng(5), {}
    for name, by in times(attacker, 15).items():
        held, free = (
            np.array([each for g, each in by.items() if (g in attacker.held) == kind]) for kind in (True, False)
        )
        again = [area(random.choice(held, len(held)), random.choice(free, len(free))) for _ in range(1000)]
        low, high = np.percentile(again, [2.5, 97.5])
        areas[name] = area(held, free)
        what = f"guesses told by the time of {name}: AUC {areas[name]:.3f} ({low:.3f} to {high:.3f})"
        counted(what, len(by), wrong=int(areas[name] > AT_MOST) * len(by))
    assert {name: found for name, found in areas.items() if found > AT_MOST} == {}


def test_the_area_tells_times_that_differ() -> None:
    random = np.random.default_rng(6)
    one, same, longer = random.normal(10, 1, 3000), random.normal(10, 1, 3000), random.normal(10.5, 1, 3000)
    assert area(one, same) < 0.52
    assert area(longer, one) > 0.6
    assert area(one, longer) == area(longer, one)
