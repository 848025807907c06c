"""Whatever of an entry's key changes, the entry is not found; the same key finds it in every process."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from braidsdk.store import ChunkStore, EntryKey, ModelIdentity, NewChunk, keys, sha256_of_tokens

LOOK_UP = """
import json, sys
from conftest import content, make_key, make_tensors
from braidsdk.store import ChunkStore, ModelIdentity

found = 0
with ChunkStore(sys.argv[1]) as store:
    for number, given in enumerate(json.load(open(sys.argv[2]))):
        given["model"] = ModelIdentity(**given["model"])
        given |= {name: tuple(given[name]) for name in ("token_ids", "after")}
        key = make_key(given.pop("chunk_id"), tokens=given.pop("token_ids"), **given)
        (hit,), (entry,) = store.look_up([key]), store.load([key])
        found += hit is not None and entry is not None and content(entry.tensors) == content(make_tensors(number))
print(found)
"""
"""Another process: how many of the keys in a file find their own entries."""


def sample(store: ChunkStore, make: Any, count: int) -> list[EntryKey]:
    """Keys of chunks after other chunks, whose entries are stored."""
    rows = store.add_chunks([NewChunk("default", 1, f"text {n}\n") for n in range(6)])
    random, made = Random(8), []
    for number in range(count):
        before = tuple(random.sample([None, *(row.id for row in rows)], random.randint(2, 4)))
        tokens = tuple(random.randrange(2**31) for _ in range(random.randint(1, 12)))
        sha256 = sha256_of_tokens([number])
        made.append(make.key(random.choice(rows).id, tokens=tokens, after=before, after_sha256=sha256))
    store.publish([(key, make.tensors(number), {}) for number, key in enumerate(made)])
    return made


def other(value: Any) -> Any:
    """Another value of a field, of the same type."""
    match value:
        case int():
            return value + 1
        case str():
            return value[:-1] + chr(ord(value[-1]) ^ 1)
    raise TypeError("a key has a field of a new type: say what another value of it is")


def changes(key: EntryKey) -> Iterator[tuple[str, EntryKey]]:
    """The key with one thing changed, each in turn."""
    for field in dataclasses.fields(ModelIdentity):
        model = dataclasses.replace(key.model, **{field.name: other(getattr(key.model, field.name))})
        yield f"model.{field.name}", dataclasses.replace(key, model=model)
    for field in dataclasses.fields(EntryKey):
        if field.name not in ("model", "token_ids", "after"):
            changed = other(getattr(key, field.name))
            yield field.name, dataclasses.replace(key, **{field.name: changed})
    yield "chunk_id", dataclasses.replace(key, chunk_id=None)
    for name in ("token_ids", "after"):
        given = getattr(key, name)
        for at, each in enumerate(given):
            changed = other(each) if each is not None else "0" * 32
            changed = changed % 2**31 if isinstance(changed, int) else changed
            yield name, dataclasses.replace(key, **{name: (*given[:at], changed, *given[at + 1 :])})
            for less in ((*given[:at], *given[at + 1 :]), (*given[: at + 1], *given[at:])):
                if less:
                    yield f"{name}, one less or more", dataclasses.replace(key, **{name: less})
        if given[::-1] != given:
            yield f"order of {name}", dataclasses.replace(key, **{name: given[::-1]})


def found_by_others(store: ChunkStore, made: list[EntryKey], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """How many other keys were looked up, and which of them found something."""
    count, wrong = 0, []
    for key in made:
        each = list(changes(key))
        assert {name.split(".")[-1] for name, _ in each} >= {
            field.name for of in (EntryKey, ModelIdentity) for field in dataclasses.fields(of) if field.name != "model"
        }
        asked = [changed for _, changed in each]
        hits = zip(each, store.look_up(asked), store.load(asked), strict=True)
        wrong += [f"{name} of {key.digest}" for (name, _), hit, entry in hits if hit or entry]
        count += len(each)
        for name in ("FORMAT_VERSION", "ALGORITHM_VERSION"):
            with monkeypatch.context() as patch:
                patch.setattr(keys, name, 99)
                again = dataclasses.replace(key)
                wrong += [name] * (store.load([again]) != [None])
            count += 1
    return count, wrong


def found_elsewhere(store: ChunkStore, made: list[EntryKey], tmp_path: Path, seed: str) -> int:
    """How many of the keys find their own entries in another process whose hashes of text are others."""
    given = tmp_path / "keys.json"
    given.write_text(json.dumps([dataclasses.asdict(key) for key in made]))
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LOOK_UP, str(store.path), str(given)]
    return int(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)


def test_every_change_of_a_key_is_a_miss(store: ChunkStore, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count, wrong = found_by_others(store, sample(store, make, 20), monkeypatch)
    assert wrong == []
    assert count > 500


def test_the_same_key_is_a_hit_in_another_process(store: ChunkStore, make: Any, tmp_path: Path) -> None:
    made = sample(store, make, 20)
    assert found_elsewhere(store, made, tmp_path, "1") == found_elsewhere(store, made, tmp_path, "2") == len(made)


@pytest.mark.campaign
def test_every_change_of_very_many_keys_is_a_miss_and_none_is_a_hit(
    store: ChunkStore, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    made = sample(store, make, 500)
    count, wrong = found_by_others(store, made, monkeypatch)
    counted("one part of an entry's key changed, which must miss", count, wrong=len(wrong))
    seeds = ("0", "1", "4294967295", "random")
    misses = sum(len(made) - found_elsewhere(store, made, tmp_path, seed) for seed in seeds)
    counted("the same key in another process with another hash seed, which must hit", len(made) * 4, wrong=misses)
    assert (wrong, misses) == ([], 0)
