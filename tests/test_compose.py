"""The composition rule: modes, positions, who owns which control token, keys."""

import hashlib
import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braidsdk.compose.modes import compose
from braidsdk.compose.repairs import most_tokens, random_tokens
from braidsdk.errors import UnknownModeError, WindowExceededError
from braidsdk.prompt.text import check_length
from braidsdk.store.keys import ModelIdentity, chunk_id, sha256_of_tokens
from braidsdk.types import Chunk

MODEL = ModelIdentity("w", "t", "float32", "none", 2, 1, 8, "{}")


@dataclass(frozen=True)
class FakeLayout:
    """Ids that show where they come from: 1 and 2 are control, a text is one id per character."""

    header_ids: tuple[int, ...] = (1, 2)

    def chunk_ids(self, level: int, text: str) -> tuple[int, ...]:
        return (1, *map(ord, text), 1, 2) if level == 0 else self.plain_ids(text)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        return (*map(ord, text), 10)


LAYOUT = FakeLayout()


def chunk(text: str, level: int = 1) -> Chunk:
    return Chunk(chunk_id("default", level, text), "default", level, text, text, {}, LAYOUT.chunk_ids)


RULES, A, B, C = chunk("rules", 0), chunk("a"), chunk("bb"), chunk("ccc")


def after(*chunks: Chunk, mode: str = "anchored") -> list[tuple[int, ...]]:
    return [segment.after for segment in compose(chunks, layout=LAYOUT, mode=mode).segments]


def test_modes_say_what_each_chunk_is_computed_after() -> None:
    assert after(RULES, A, B, mode="exact") == [(), (0,), (0, 1)]
    assert after(RULES, A, B, mode="isolated") == [(), (), ()]
    assert after(RULES, A, B) == after(RULES, A, B, mode="anchored") == [(), (0,), (0,)]


def test_without_an_anchor_the_header_stands_alone_and_chunks_are_isolated() -> None:
    composition = compose([A, B], layout=LAYOUT)
    assert [segment.chunk for segment in composition.segments] == [None, A, B]
    assert [segment.after for segment in composition.segments] == [(), (), ()]
    assert "no anchor" in composition.notes[0]
    assert after(A, B, mode="exact") == [(), (0,), (0, 1)]


def test_a_second_or_later_system_chunk_is_a_plain_chunk() -> None:
    other = chunk("other", 0)
    composition = compose([RULES, A, other], layout=LAYOUT)
    assert composition.segments[2].token_ids == LAYOUT.plain_ids("other")
    assert composition.segments[2].after == (0,)
    assert "other" in composition.notes[0]
    late = compose([A, RULES], layout=LAYOUT)
    assert late.segments[0].chunk is None
    assert [segment.after for segment in late.segments] == [(), (), ()]


@given(st.permutations([RULES, A, B, C, A]), st.sampled_from(["exact", "isolated", "anchored"]))
def test_positions_are_contiguous_and_ids_are_the_prompt(order: list[Chunk], mode: str) -> None:
    composition = compose(order, layout=LAYOUT, mode=mode).with_tail((7, 7))
    position = 0
    for segment in composition.segments:
        assert segment.origin == position
        position += len(segment.token_ids)
    assert composition.tail_origin == position
    assert composition.input_ids == (*(i for s in composition.segments for i in s.token_ids), 7, 7)


def test_only_chains_of_exact_stay_out_of_the_store_unless_kept() -> None:
    def keeps(mode: str, keep: bool | None = None) -> list[bool]:
        return [segment.keep for segment in compose([RULES, A, B], layout=LAYOUT, mode=mode, keep=keep).segments]

    assert keeps("anchored") == keeps("isolated") == [True, True, True]
    assert keeps("exact") == [True, False, False]
    assert keeps("exact", keep=True) == [True, True, True]
    assert keeps("anchored", keep=False) == [False, False, False]


def test_keys_depend_on_what_a_chunk_was_computed_after_and_on_nothing_else() -> None:
    def digests(*chunks: Chunk, mode: str) -> list[str]:
        return [key.digest for key in compose(chunks, layout=LAYOUT, mode=mode).keys(MODEL, "default")]

    anchored = digests(RULES, A, B, mode="anchored")
    assert digests(RULES, B, A, mode="anchored") == [anchored[0], anchored[2], anchored[1]]
    exact = digests(RULES, A, B, mode="exact")
    assert exact[:2] == anchored[:2], "right behind the anchor the two modes mean the same"
    assert exact[2] != anchored[2]
    assert digests(RULES, B, A, mode="exact")[2] != exact[1]
    assert len({*digests(RULES, A, mode="isolated"), anchored[1]}) == 3
    changed = replace(MODEL, dtype="bfloat16")
    assert not {key.digest for key in compose([RULES, A], layout=LAYOUT).keys(changed, "default")} & set(anchored)


@given(st.permutations([RULES, A, B, C, A]), st.sampled_from(["exact", "isolated", "anchored"]), st.integers(0, 7))
def test_keys_hash_what_stands_before_by_the_plain_definition(order: list[Chunk], mode: str, known: int) -> None:
    composition = compose(order, layout=LAYOUT, mode=mode).with_turn((7, 8)).with_turn((9,))
    keys = composition.keys(MODEL, "default")
    for key, segment in zip(keys, composition.segments, strict=True):
        before = [keys[i] for i in segment.after]
        seen = sha256_of_tokens(i for other in before for i in other.token_ids)
        if segment.is_turn:
            seen = hashlib.sha256("".join(o.record_json + o.token_sha256 for o in before).encode()).hexdigest()
        assert key.after_sha256 == seen
    assert composition.keys(MODEL, "default", keys[:known]) == keys


def test_exact_hashes_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, hashed = hashlib.sha256, []

    class Counting:
        """SHA-256 that counts what it is given."""

        def __init__(self, data: bytes = b"") -> None:
            self._state = real()
            self.update(data)

        def update(self, data: bytes) -> None:
            hashed.append(len(data))
            self._state.update(data)

        def hexdigest(self) -> str:
            return self._state.hexdigest()

    composition = compose([chunk(f"{i:99}") for i in range(50)], layout=LAYOUT, mode="exact")
    monkeypatch.setattr(hashlib, "sha256", Counting)
    composition.keys(MODEL, "default")
    assert sum(hashed) <= 4 * composition.tokens


def test_a_text_far_beyond_the_window_is_told_by_its_length() -> None:
    check_length("x" * 320, 10, "This text", "Split it.")
    with pytest.raises(WindowExceededError, match=r"at most 320 characters, 32 for .* got 321. Split it."):
        check_length("x" * 321, 10, "This text", "Split it.")


def test_random_tokens_follow_from_the_tail_and_their_places() -> None:
    composition = compose([chunk(f"{i:99}") for i in range(30)], layout=LAYOUT, mode="random(0.1)").with_tail((1, 2))
    chosen = random_tokens(composition)
    assert chosen == random_tokens(composition) == sorted(set(chosen))
    chunks = composition.tail_origin - len(composition.segments[0].token_ids)
    assert len(chosen) == math.ceil(0.1 * chunks) == most_tokens(composition)
    others = random_tokens(composition.with_tail((1, 3)))
    assert len({*chosen} & {*others}) < len(chosen) / 2, "another question gets other tokens"
    assert 0.4 < sum(chosen) / len(chosen) / composition.tail_origin < 0.6, "they stand everywhere"


def test_an_unknown_mode_names_the_known_ones() -> None:
    known = r"exact, isolated, anchored, linked\(16\), guided\(0.15\), blended\(0.2\), random\(0.15\); got 'fast'"
    with pytest.raises(UnknownModeError, match=known):
        compose([A], layout=LAYOUT, mode="fast")
