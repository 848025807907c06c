"""Hypothesis does anything in any order to two handles of one store, and compares each answer with a model's.

    python machine.py --examples 8 --steps 50

Besides all calls: either handle is closed and opened again, and files of entries are damaged, swapped and removed. A
failure prints the shortest program that shows it. Prints JSON.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from model import Known, Model
from processes import left_over

from braidsdk.errors import NameTakenError, UnknownChunkError
from braidsdk.store import ChunkStore, collect

SPACE = "default"
TEXTS = [f"<text {number}>" for number in range(4)]
NAMES = ["one", "two", "three"]
EVERYTHING = [Known(text, after, number) for text in (None, *TEXTS) for after in (None, *TEXTS) for number in (0, 1)]
handles = st.integers(0, 1)
texts = st.sampled_from(TEXTS)
names = st.none() | st.sampled_from(NAMES)
metadata = st.none() | st.dictionaries(st.sampled_from("ab"), st.none() | st.booleans() | st.integers(0, 2), max_size=2)
some = st.lists(st.sampled_from(EVERYTHING), min_size=1, max_size=4)

CALLS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "add": {"at": handles, "text": texts, "name": names, "given": metadata, "replace": st.booleans()},
    "update": {"at": handles, "text": texts, "name": names, "given": metadata, "replace": st.booleans()},
    "delete": {"at": handles, "gone": st.lists(texts, max_size=2)},
    "publish": {"at": handles, "entries": some},
    "load": {"at": handles, "entries": some | st.just(EVERYTHING)},
    "look_up": {"at": handles},
    "list_and_count": {"at": handles, "name": names, "level": st.sampled_from((None, 1, 2)), "given": metadata},
    "find": {"at": handles},
    "damage": {
        "one": st.integers(0, 99),
        "other": st.integers(0, 99),
        "how": st.sampled_from(("turn over a bit", "cut", "remove", "swap")),
        "place": st.integers(0, 99_999),
    },
    "reopen": {"at": handles},
}
"""Each call and what it is given."""

done: Counter[str] = Counter()


class Machine(RuleBasedStateMachine):
    """The store must answer as the model does.

    Attributes:
        model: what is registered, and the entries that the index has.
        broken: those of the entries whose files are not what was written; the store does not know yet.
        aside: entries that were found to be broken, and were not published again.
        damaged: how many were found to be broken so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.stores = [ChunkStore(self.folder / "store") for _ in range(2)]
        self.model = Model()
        self.broken: set[Known] = set()
        self.aside: set[Known] = set()
        self.damaged = 0

    @initialize(entries=some)
    def begin(self, entries: list[Known]) -> None:
        for text in dict.fromkeys(text for each in entries for text in (each.text, each.after) if text is not None):
            self.add(0, text, None, None, False)
        self.publish(1, entries)

    # one rule for all calls, because Hypothesis leaves most rules out of most programs
    @rule(data=st.data(), name=st.sampled_from(list(CALLS)))
    def call(self, name: str, data: st.DataObject) -> None:
        done[name] += 1
        getattr(self, name)(**data.draw(st.fixed_dictionaries(CALLS[name])))

    def add(self, at: int, text: str, name: str | None, given: dict[str, Any] | None, replace: bool) -> None:
        try:
            row = self.stores[at].add_chunk(
                namespace=SPACE, level=1, text=text, name=name, metadata=given, replace=replace
            )
        except NameTakenError:
            assert self._is_taken(name, text)
            assert not replace
            return
        assert replace or not self._is_taken(name, text)
        self.model.add(text, name, given)
        assert (set(row.names), row.metadata) == self.model.chunks[text]

    def update(self, at: int, text: str, name: str | None, given: dict[str, Any] | None, replace: bool) -> None:
        try:
            row = self.stores[at].update_chunk(SPACE, model.id_of(text), name=name, metadata=given, replace=replace)
        except UnknownChunkError:
            assert text not in self.model.chunks
            return
        except NameTakenError:
            assert self._is_taken(name, text)
            assert not replace
            return
        self.model.add(text, name, given)
        assert (set(row.names), row.metadata) == self.model.chunks[text]

    def delete(self, at: int, gone: list[str]) -> None:
        before = self.model.copy()
        found = self.stores[at].delete_chunks(SPACE, [model.id_of(text) for text in gone])
        self.model.delete(gone)
        assert found.chunks == len(before.chunks) - len(self.model.chunks)
        assert set(found.digests) == {model.key_of(each).digest for each in before.entries - self.model.entries}
        self.broken &= self.model.entries
        self.aside = {each for each in self.aside if each.text not in gone and each.after not in gone}

    def publish(self, at: int, entries: list[Known]) -> None:
        wanted = {text for each in entries for text in (each.text, each.after)}
        try:
            model.publish(self.stores[at], entries)
        except UnknownChunkError:
            assert not wanted <= {None, *self.model.chunks}
            return
        new = set(entries) - self.model.entries
        assert {text for each in new for text in (each.text, each.after)} <= {None, *self.model.chunks}
        self.model.entries |= new
        self.aside -= new

    def load(self, at: int, entries: list[Known]) -> None:
        found = model.loaded(self.stores[at], entries)
        broken = self.broken.intersection(entries)
        assert found == self.model.entries.intersection(entries) - broken
        self.damaged += len(broken)
        self.model.entries -= broken
        self.broken -= broken
        self.aside |= broken

    def look_up(self, at: int) -> None:
        keys = [model.key_of(each) for each in EVERYTHING]
        hits = self.stores[at].look_up(keys)
        assert [hit is not None for hit in hits] == [each in self.model.entries for each in EVERYTHING]
        for each, miss in zip(EVERYTHING, self.stores[at].explain(keys), strict=True):
            assert (miss.reason == "damaged") == (each in self.aside)

    def list_and_count(self, at: int, name: str | None, level: int | None, given: dict[str, Any] | None) -> None:
        wanted = [
            text
            for text, (named, has) in self.model.chunks.items()
            if (name is None or name in named) and level != 2 and _has(has, given or {})
        ]
        rows = self.stores[at].list_chunks(SPACE, name=name, metadata=given, level=level)
        assert [row.text for row in rows] == wanted
        assert [(set(row.names), row.metadata) for row in rows] == [self.model.chunks[text] for text in wanted]
        assert self.stores[at].count_chunks(SPACE, name=name, metadata=given, level=level) == len(wanted)
        stats = self.stores[at].stats(SPACE)
        assert (stats.chunks, stats.entries) == (len(self.model.chunks), len(self.model.entries))
        assert stats.damaged == self.stores[at].damaged_count == self.damaged

    def find(self, at: int) -> None:
        texts = {each: self._named(each) for each in (*NAMES, *map(model.id_of, TEXTS))}
        found = self.stores[at].find_named(SPACE, texts)
        assert {each: row.text for each, row in found.items()} == {each: text for each, text in texts.items() if text}
        for row in found.values():
            assert (set(row.names), row.metadata) == self.model.chunks[row.text]

    def damage(self, one: int, other: int, how: str, place: int) -> None:
        whole = sorted(self.model.entries - self.broken, key=repr)
        if not whole:
            return
        entry = whole[one % len(whole)]
        path = self._file(entry)
        before = bytearray(path.read_bytes())
        if how == "remove":
            path.unlink()
            self.broken.add(entry)
            return
        after = before.copy()
        if how == "swap":
            after = bytearray(self._file(whole[other % len(whole)]).read_bytes())
        elif how == "cut":
            del after[place // 8 % len(after) :]
        else:
            after[place // 8 % len(after)] ^= 1 << place % 8
        if after != before:
            path.write_bytes(after)
            self.broken.add(entry)

    def reopen(self, at: int) -> None:
        self.stores[at].close()
        self.stores[at] = ChunkStore(self.folder / "store")

    def teardown(self) -> None:
        for at in (0, 1):
            self.look_up(at)
            self.find(at)
            self.list_and_count(at, None, None, None)
        checked = self.stores[0].check(share=1.0)
        assert {digest for digest, _ in checked.damaged} == {model.key_of(each).digest for each in self.broken}
        assert (checked.index, checked.stray, checked.entries) == ((), (), len(self.model.entries))
        for each in self.stores:
            each.close()
        assert (
            left_over(self.folder / "store" / "entries", {self._file(each).name for each in self.model.entries}) == []
        )
        shutil.rmtree(self.folder)

    def _is_taken(self, name: str | None, text: str) -> bool:
        return name is not None and self._named(name) not in (None, text)

    def _named(self, name_or_id: str) -> str | None:
        for text, (named, _) in self.model.chunks.items():
            if name_or_id in named or name_or_id == model.id_of(text):
                return text
        return None

    def _file(self, entry: Known) -> Path:
        return self.stores[0]._layout.entry(model.key_of(entry).digest)


def _has(metadata: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """JSON's true is not 1."""
    return all(
        key in metadata and (type(metadata[key]), metadata[key]) == (type(value), value)
        for key, value in wanted.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    collect.SWEEP_EVERY_S = 0.0
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=options.examples,
            stateful_step_count=options.steps,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # to shrink a failure takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
    sys.stdout.write(json.dumps({"counts": {"steps": done.total(), **done}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
