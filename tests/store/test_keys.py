"""Keys: what is the same key, what is not, and how two records differ."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braidsdk.errors import InputError
from braidsdk.store import chunk_id, differences, sha256_of_tokens

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
levels = st.integers(0, 300)


@given(texts, levels, texts, texts, levels, texts)
def test_chunk_ids_are_equal_only_for_equal_parts(
    space: str, level: int, text: str, other_space: str, other_level: int, other_text: str
) -> None:
    same = (space, level, text) == (other_space, other_level, other_text)
    assert (chunk_id(space, level, text) == chunk_id(other_space, other_level, other_text)) == same


@given(texts, levels, texts, st.integers(0, 24))
def test_text_moved_over_the_border_between_namespace_and_text_gives_another_id(
    space: str, level: int, text: str, cut: int
) -> None:
    joined = space + text
    moved = (joined[:cut], joined[cut:])
    assert (chunk_id(space, level, text) == chunk_id(moved[0], level, moved[1])) == (moved == (space, text))


@pytest.mark.parametrize(
    ("one", "other"),
    [(("1:", 2, "x"), ("1", 2, ":x")), (("", 1, "1:1:a"), ("1", 1, ":1:a")), (("a", 11, "b"), ("a", 1, "1b"))],
)
def test_separators_inside_the_parts_do_not_confuse_ids(one: Any, other: Any) -> None:
    assert chunk_id(*one) != chunk_id(*other)


def test_an_id_is_32_hex_digits_and_never_changes() -> None:
    assert chunk_id("default", 1, "Zorbin\n") == "f83f0df7f80e35dcca93aa508e683bca"


def test_half_a_surrogate_pair_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="half a surrogate pair at character 1"):
        chunk_id("default", 1, "a\ud800")


def test_every_field_of_a_key_changes_its_digest(make: Any) -> None:
    key = make.key("c" * 32, after=(None, "d" * 32))
    changed = [
        dataclasses.replace(key, namespace="other"),
        dataclasses.replace(key, chunk_id=None),
        dataclasses.replace(key, level=0),
        dataclasses.replace(key, token_ids=(5, 6, 7, 9, 8)),
        dataclasses.replace(key, after=("d" * 32, None)),
        dataclasses.replace(key, after_sha256=sha256_of_tokens((1,))),
    ]
    for field in dataclasses.fields(make.model):
        value = getattr(make.model, field.name)
        other = value + 1 if isinstance(value, int) else value + "x"
        changed.append(dataclasses.replace(key, model=dataclasses.replace(make.model, **{field.name: other})))
    digests = [key.digest, *(other.digest for other in changed)]
    assert len(set(digests)) == len(digests)


def test_format_and_algorithm_versions_change_the_digest(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [make.key(None).digest]
    for name in ("FORMAT_VERSION", "ALGORITHM_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(f"braidsdk.store.keys.{name}", 99)
            digests.append(make.key(None).digest)
    assert len(set(digests)) == 3


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_token_ids_hash_alike_only_when_they_are_alike(one: list[int], other: list[int]) -> None:
    assert (sha256_of_tokens(one) == sha256_of_tokens(other)) == (one == other)


def test_token_ids_hash_as_little_endian_int32() -> None:
    assert sha256_of_tokens(iter((1, 258))) == hashlib.sha256(b"\1\0\0\0\2\1\0\0").hexdigest()


@pytest.mark.parametrize("tokens", [(), (-1,), (2**31,)], ids=["none", "negative", "beyond int32"])
def test_token_ids_out_of_range_are_refused(make: Any, tokens: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="token id"):
        make.key(None, tokens=tokens)


def test_a_record_holds_all_but_the_token_ids_and_survives_json(make: Any) -> None:
    key = make.key("c" * 32, after=(None,))
    record = key.record()
    assert json.loads(json.dumps(record)) == record
    assert "token_ids" not in key.record_json
    assert {"format", "algorithm", "model", "namespace", "chunk_id", "level", "after", "after_sha256"} == set(record)


def test_equal_keys_are_one_dictionary_key(make: Any) -> None:
    assert {make.key("c" * 32): 1}[make.key("c" * 32)] == 1
    assert make.key("c" * 32) != make.key("d" * 32)


def test_an_entry_saw_its_own_chunk_and_all_before_it_once(make: Any) -> None:
    key = make.key("c" * 32, after=(None, "d" * 32, "c" * 32, "d" * 32))
    assert key.chunk_ids() == ("c" * 32, "d" * 32)


def test_equal_records_do_not_differ(make: Any) -> None:
    assert differences(make.key("c" * 32).record(), make.key("c" * 32, tokens=(1,)).record()) == ()


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"weights": "ff" * 16}, "model", "other weights"),
        ({"layers": 9}, "model", "layers = 9; this model has 3"),
        ({"tokenizer": "ff" * 16}, "tokenizer", "another tokenizer"),
        ({"dtype": "float32"}, "dtype", "computed in float32; this model runs in bfloat16"),
        ({"codec": "int8"}, "codec", "packed as int8"),
        ({"rope": "{}"}, "rope", "another RoPE config"),
    ],
)
def test_a_difference_of_models_is_named(make: Any, change: dict[str, Any], reason: str, words: str) -> None:
    wanted = make.key("c" * 32)
    found = make.key("c" * 32, model=dataclasses.replace(make.model, **change))
    (difference,) = differences(wanted.record(), found.record())
    assert difference.reason == reason
    assert words in difference.words


def test_another_order_before_a_chunk_is_named_in_words(make: Any) -> None:
    wanted = make.key("c" * 32)
    found = make.key("c" * 32, after=(None, *("d" * 32, "e" * 32, "f" * 32)), after_sha256=sha256_of_tokens((1,)))
    (difference,) = differences(wanted.record(), found.record())
    assert difference.reason == "after"
    assert "the bare prompt header, chunk dddddddd, chunk eeeeeeee and 1 more" in difference.words
    assert difference.words.endswith("wanted on its own")


def test_hashes_that_follow_from_another_tokenizer_are_not_a_second_difference(make: Any) -> None:
    model = dataclasses.replace(make.model, tokenizer="ff" * 16)
    wanted = make.key("c" * 32, after=("d" * 32,), after_sha256=sha256_of_tokens((1,)))
    found = make.key("c" * 32, model=model, after=("d" * 32,), after_sha256=sha256_of_tokens((2,)))
    assert [difference.reason for difference in differences(wanted.record(), found.record())] == ["tokenizer"]


def test_importing_the_store_imports_no_torch() -> None:
    code = "import sys, braidsdk.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
