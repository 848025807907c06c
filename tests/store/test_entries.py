"""KV entries: published, found, loaded, damaged and deleted."""

import dataclasses
import os
import resource
import stat
import threading
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from braidsdk.errors import InputError, StoreCorruptError, StoreError, UnknownChunkError
from braidsdk.store import (
    Array,
    ChunkStore,
    Entry,
    EntryKey,
    Hit,
    Miss,
    NewChunk,
    Tensors,
    blobs,
    entries,
    sha256_of_tokens,
)
from braidsdk.store import files as files_module
from braidsdk.types import LEVEL_OVERLAY

SHA = sha256_of_tokens


def files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".safetensors", ".part")
    )


def only(results: list[Any], kind: type) -> Any:
    assert len(results) == 1
    assert isinstance(results[0], kind), results[0]
    return results[0]


def test_an_entry_is_a_miss_then_published_then_loaded(store: ChunkStore, chunk: str, make: Any) -> None:
    key, tensors = make.key(chunk), make.tensors()
    assert store.look_up([key]) == store.load([key]) == [None]
    assert store.explain([key]) == [Miss("absent", "never computed in this store")]
    store.publish([(key, tensors, {"torch": "2.13"})])
    hit = only(store.look_up([key]), Hit)
    assert (hit.digest, hit.tokens, hit.nbytes) == (key.digest, 5, sum(each.nbytes for each in tensors.values()))
    assert hit.path.is_file()
    entry = only(store.load([key]), Entry)
    assert make.content(entry.tensors) == make.content(tensors)
    assert (entry.key, entry.nbytes) == (key, hit.nbytes)
    assert entry.provenance == {"torch": "2.13"}


def test_looking_up_and_loading_ask_for_no_reason(
    store: ChunkStore, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [make.key(chunk), make.key(None)]
    store.publish([(key, make.tensors(), {}) for key in keys])
    only(store.look_up(keys[:1]), Hit).path.unlink()
    monkeypatch.setattr("braidsdk.store.reasons.explain", lambda *_: pytest.fail("it was asked why"))
    assert [type(found) for found in store.load([*keys, make.key(chunk, level=0)])] == [NoneType, Entry, NoneType]
    assert [type(found) for found in store.look_up([*keys, make.key(chunk, level=0)])] == [NoneType, Hit, NoneType]


def test_an_overlay_is_no_reason(store: ChunkStore, chunk: str, make: Any) -> None:
    """However many there are, and with the same tokens."""
    key, header = make.key(chunk), make.key(None, level=0)
    overlays = [make.key(None, level=LEVEL_OVERLAY, after=(chunk,), after_sha256=SHA((n,))) for n in range(70)]
    store.publish([(header, make.tensors(), {})])
    store.publish([(each, make.tensors(), {}) for each in overlays])
    wanted = make.key(None, level=0, model=dataclasses.replace(make.model, dtype="float32"))
    assert [miss.reason for miss in store.explain([wanted, key])] == ["dtype", "level"]
    assert store.explain([key])[0].detail.startswith("computed as level 0;")


def test_an_entry_that_came_since_it_was_looked_up_is_no_reason(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    assert only(store.explain([make.key(chunk)]), Miss).reason == "absent"


def test_another_opening_finds_the_entry(folder: Path, make: Any) -> None:
    with ChunkStore(folder) as store:
        key = make.key(store.add_chunk(namespace="default", level=1, text="one\n").id)
        store.publish([(key, make.tensors(), {})])
    with ChunkStore(folder) as store:
        assert make.content(only(store.load([key]), Entry).tensors) == make.content(make.tensors())


def test_the_bare_header_is_an_entry_without_a_chunk(store: ChunkStore, make: Any) -> None:
    key = make.key(None, level=0)
    store.publish([(key, make.tensors(), {})])
    only(store.load([key]), Entry)


def test_hits_and_misses_come_in_the_order_of_the_keys(store: ChunkStore, make: Any) -> None:
    rows = store.add_chunks([NewChunk("default", 1, f"{i}\n") for i in range(1000)])
    keys = [make.key(row.id, tokens=(i + 1,)) for i, row in enumerate(rows)]
    store.publish([(key, make.tensors(), {}) for key in keys[:4:2]])
    found = store.look_up([*keys, keys[0]])
    assert [i for i, result in enumerate(found) if isinstance(result, Hit)] == [0, 2, 1000]
    assert [type(result) for result in store.load(keys[:4])] == [Entry, NoneType, Entry, NoneType]


def test_entries_are_read_into_the_callers_memory(store: ChunkStore, make: Any) -> None:
    rows = store.add_chunks([NewChunk("default", 1, f"{i}\n") for i in range(4)])
    keys = [make.key(row.id, tokens=(i + 1,)) for i, row in enumerate(rows)]
    wanted = {key.digest: make.tensors(i) for i, key in enumerate(keys)}
    store.publish([(key, wanted[key.digest], {}) for key in keys[:3]])
    flip(only(store.look_up([keys[1]]), Hit).path)
    memory: dict[str, dict[str, Array]] = {}

    def place(key: EntryKey) -> Tensors:
        memory[key.digest] = {
            name: Array(each.dtype, each.shape, [memoryview(bytearray(each.nbytes))])
            for name, each in wanted[key.digest].items()
        }
        return memory[key.digest]

    found = list(store.stream(keys, place))
    assert [type(each) for each in found] == [Entry, NoneType, Entry, NoneType]
    assert memory.keys() == {key.digest for key in keys[:3]}
    for each in (found[0], found[2]):
        assert each.tensors is memory[each.key.digest]
        assert make.content(each.tensors) == make.content(wanted[each.key.digest])


def test_publishing_again_changes_nothing(store: ChunkStore, chunk: str, make: Any) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {}), (key, make.tensors(), {})])
    before = only(store.look_up([key]), Hit).path.stat()
    store.publish([(key, make.tensors(1), {})])
    after = only(store.look_up([key]), Hit).path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert store.stats("default").entries == 1


def test_an_entry_that_is_there_is_not_written_again(
    store: ChunkStore, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    monkeypatch.setattr(blobs, "write", None)
    store.publish([(make.key(chunk), make.tensors(), {})])


def test_a_late_removal_spares_what_was_published_again(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    store._collector.remove_entries([make.key(chunk).digest])
    only(store.load([make.key(chunk)]), Entry)


def test_another_text_with_the_same_token_ids_is_absent(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    other = store.add_chunk(namespace="default", level=1, text="Another text.\n")
    assert only(store.explain([make.key(other.id)]), Miss).reason == "absent"


@pytest.mark.parametrize(
    ("made", "files_mode", "folders_mode"),
    [
        (None, 0o600, 0o700),
        (0o755, 0o600, 0o700),
        (0o770, 0o660, 0o770),
        (0o2770, 0o660, 0o2770),
        (0o777, 0o666, 0o777),
    ],
)
def test_files_are_the_owners_unless_the_folder_is_shared(
    folder: Path, make: Any, made: int | None, files_mode: int, folders_mode: int
) -> None:
    if made is not None:
        folder.mkdir()
        folder.chmod(made)
    old = os.umask(0o022)
    try:
        with ChunkStore(folder) as store:
            key = make.key(store.add_chunk(namespace="default", level=1, text="secret").id)
            store.publish([(key, make.tensors(), {})])
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == (made or 0o700)
    assert {mode for path, mode in modes.items() if path.is_file()} == {files_mode}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {folders_mode}


def test_file_and_folder_are_synced_before_the_row(
    store: ChunkStore, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace, insert_rows = os.fsync, Path.replace, entries.insert

    def fsync(descriptor: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    def insert(*given: Any) -> None:
        steps.append("row")
        insert_rows(*given)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    monkeypatch.setattr("braidsdk.store.entries.insert", insert)
    store.publish([(make.key(chunk), make.tensors(), {})])
    assert steps[:2] == ["sync file", "rename"]
    assert steps[-1] == "row"
    assert set(steps[2:-1]) == {"sync folder"}
    assert len(steps) == 5  # the entry's folder, and the folder that it is new in


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("weights", "ff" * 16, "model"),
        ("head_dim", 8, "model"),
        ("tokenizer", "ff" * 16, "tokenizer"),
        ("dtype", "float32", "dtype"),
        ("codec", "int8", "codec"),
        ("rope", "{}", "rope"),
    ],
)
def test_another_model_is_a_miss_with_its_reason(
    store: ChunkStore, chunk: str, make: Any, field: str, value: Any, reason: str
) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    tokens = (1, 2) if reason == "tokenizer" else (5, 6, 7, 8, 9)
    wanted = make.key(chunk, tokens=tokens, model=dataclasses.replace(make.model, **{field: value}))
    assert store.look_up([wanted]) == store.load([wanted]) == [None]
    assert only(store.explain([wanted]), Miss).reason == reason


def test_another_dtype_is_told_in_a_sentence(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    wanted = make.key(chunk, model=dataclasses.replace(make.model, dtype="float32"))
    assert store.explain([wanted]) == [Miss("dtype", "computed in bfloat16; this model runs in float32")]


@pytest.mark.parametrize("secret", ["default", "other\0more"], ids=ascii)
def test_a_miss_never_tells_of_another_namespace(store: ChunkStore, make: Any, secret: str) -> None:
    text = "The capital of Aistonia is Zorbin.\n"
    theirs, ours = (store.add_chunk(namespace=name, level=1, text=text).id for name in (secret, "other"))
    known = [make.key(theirs), make.key(theirs, level=0), make.key(None), make.key(None, level=0)]
    store.publish([(dataclasses.replace(key, namespace=secret), make.tensors(), {}) for key in known])
    keys = [make.key(ours, namespace="other"), make.key(None, level=0, namespace="other")]
    assert store.explain(keys) == [Miss("absent", "never computed in this store")] * 2


def test_another_namespaces_entries_do_not_hide_the_closest_one(
    store: ChunkStore, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braidsdk.store.reasons.CANDIDATES", 1)
    other = store.add_chunk(namespace="other", level=1, text="text\n")
    keys = [make.key(chunk, level=0), make.key(other.id, namespace="other", level=0)]
    store.publish([(key, make.tensors(), {}) for key in keys])
    mine = store.add_chunk(namespace="default", level=1, text="text\n")
    assert only(store.explain([make.key(mine.id)]), Miss).reason == "level"


def test_an_entry_after_something_else_is_a_miss_with_its_reason(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk, after=(None,), after_sha256=SHA((1,))), make.tensors(), {})])
    assert only(store.explain([make.key(chunk)]), Miss).reason == "after"


def test_a_text_with_other_token_ids_is_a_miss_with_its_reason(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    assert only(store.explain([make.key(chunk, tokens=(1, 2))]), Miss).reason == "tokens"


def test_an_older_algorithm_is_a_miss_with_its_reason(
    store: ChunkStore, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    monkeypatch.setattr("braidsdk.store.keys.ALGORITHM_VERSION", 99)
    assert only(store.explain([make.key(chunk)]), Miss).reason == "version"


def test_the_closest_stored_entry_gives_the_reason(store: ChunkStore, chunk: str, make: Any) -> None:
    far = dataclasses.replace(make.model, weights="ff" * 16, rope="{}")
    near = dataclasses.replace(make.model, dtype="float32")
    chain = make.key(chunk, model=near, after=(None,), after_sha256=SHA((1,)))
    keys = (make.key(chunk, model=near), make.key(chunk, model=far), chain)
    store.publish([(key, make.tensors(), {}) for key in keys])
    assert only(store.explain([make.key(chunk)]), Miss).reason == "dtype"


def test_all_differences_of_the_closest_are_told(store: ChunkStore, chunk: str, make: Any) -> None:
    far = dataclasses.replace(make.model, weights="ff" * 16, rope="{}")
    store.publish([(make.key(chunk, model=far), make.tensors(), {})])
    assert only(store.explain([make.key(chunk)]), Miss).detail.endswith("(differs also in: rope)")


@pytest.mark.parametrize("change", [{"tokens": (1, 2, 3)}, {"after": (None,)}], ids=["other tokens", "other record"])
def test_two_keys_with_one_digest_are_a_miss_never_wrong_data(
    store: ChunkStore, chunk: str, make: Any, change: dict[str, Any]
) -> None:
    stored, wanted = make.key(chunk), make.key(chunk, **change)
    store.publish([(stored, make.tensors(), {})])
    wanted.__dict__["digest"] = stored.digest
    assert store.look_up([wanted]) == store.load([wanted]) == [None]
    assert only(store.explain([wanted]), Miss).reason == "collision"
    store.publish([(wanted, make.tensors(1), {})])
    assert make.content(only(store.load([stored]), Entry).tensors) == make.content(make.tensors())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (flip, "does not match its digest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "must have"),
        (lambda path: path.write_bytes(b""), "at least 8 bytes"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["flipped", "truncated", "emptied", "deleted"],
)
def test_a_damaged_file_is_set_aside_counted_and_computed_again(
    store: ChunkStore, folder: Path, chunk: str, make: Any, harm: Any, why: str
) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {})])
    path = only(store.look_up([key]), Hit).path
    harm(path)
    there = path.exists()
    assert store.load([key]) == [None]
    miss = only(store.explain([key]), Miss)
    assert miss.reason == "damaged"
    assert why in miss.detail
    assert store.look_up([key]) == [None]
    assert not path.exists()
    assert len(list((folder / "damaged").iterdir())) == there
    assert (store.damaged_count, store.stats("default").damaged, store.stats("default").entries) == (1, 1, 0)
    store.publish([(key, make.tensors(), {})])
    assert make.content(only(store.load([key]), Entry).tensors) == make.content(make.tensors())
    assert store.damaged_count == 1


def test_a_good_file_in_a_wrong_place_is_set_aside(store: ChunkStore, chunk: str, make: Any) -> None:
    one, other = make.key(chunk), make.key(chunk, after=(None,))
    store.publish([(one, make.tensors(1), {}), (other, make.tensors(2), {})])
    paths = [hit.path for hit in store.look_up([one, other]) if isinstance(hit, Hit)]
    paths[1].write_bytes(paths[0].read_bytes())
    with store._index.write() as db:
        db.execute("update entries set payload_digest = ?", [blobs.read_header(paths[0]).digest])
    assert store.load([other]) == [None]
    assert "another entry" in only(store.explain([other]), Miss).detail
    assert make.content(only(store.load([one]), Entry).tensors) == make.content(make.tensors(1))


def test_a_sound_file_that_the_index_does_not_name_is_set_aside(store: ChunkStore, chunk: str, make: Any) -> None:
    """Someone has computed its digests again after changing it."""
    key = make.key(chunk)
    store.publish([(key, make.tensors(1), {})])
    path = only(store.look_up([key]), Hit).path
    path.unlink()
    there = store.find_chunks("default", [chunk])[chunk]
    record = {"id": there.id, "namespace": there.namespace, "level": there.level, "text": there.text}
    given = {"chunk": record, "tensors": make.tensors(2), "provenance": {}, "created": "", "mode": 0o600}
    blobs.write(path, key=key, **given)
    assert store.load([key]) == [None]
    assert "not the file that the index names" in only(store.explain([key]), Miss).detail


def test_a_file_replaced_after_it_was_looked_up_is_read_again(
    store: ChunkStore, folder: Path, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(1), {})])
    look_up = store.look_up

    def replaced_after(keys: Any) -> Any:
        found = look_up(keys)
        flip(found[0].path)
        with ChunkStore(folder) as other:
            other.load([key])
            other.publish([(key, make.tensors(2), {})])
        return found

    monkeypatch.setattr(store, "look_up", replaced_after)
    assert make.content(only(store.load([key]), Entry).tensors) == make.content(make.tensors(2))
    assert store.damaged_count == 1


def test_a_file_replaced_while_it_was_read_is_read_again(
    store: ChunkStore, folder: Path, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {})])
    flip(only(store.look_up([key]), Hit).path)
    read = blobs.read

    def replaced_meanwhile(path: Path, place: Tensors | None, **given: Any) -> blobs.Blob:
        try:
            return read(path, place, **given)
        finally:
            monkeypatch.setattr(blobs, "read", read)
            with ChunkStore(folder) as other:
                other.load([key])
                other.publish([(key, make.tensors(), {})])

    monkeypatch.setattr(blobs, "read", replaced_meanwhile)
    assert make.content(only(store.load([key]), Entry).tensors) == make.content(make.tensors())
    assert store.damaged_count == 1


def test_damage_found_by_two_at_once_is_counted_once(folder: Path, make: Any) -> None:
    key = make.key(None)
    with ChunkStore(folder) as one, ChunkStore(folder) as other:
        one.publish([(key, make.tensors(), {})])
        flip(only(one.look_up([key]), Hit).path)
        gate, results = threading.Barrier(2), []

        def load(store: ChunkStore) -> None:
            gate.wait()
            results.extend(store.load([key]))

        threads = [threading.Thread(target=load, args=(store,)) for store in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [None, None]
        assert only(one.explain([key]), Miss).reason == "damaged"
        assert one.damaged_count == 1


def test_an_entry_deleted_while_it_was_read_is_absent_not_damaged(
    store: ChunkStore, folder: Path, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {})])
    read = blobs.read

    def deleted_meanwhile(path: Path, place: Tensors | None, **given: Any) -> blobs.Blob:
        with ChunkStore(folder) as other:
            other.delete_chunk("default", chunk)
        return read(path, place, **given)

    monkeypatch.setattr(blobs, "read", deleted_meanwhile)
    assert store.load([key]) == [None]
    assert only(store.explain([key]), Miss).reason == "absent"
    assert store.damaged_count == 0


def test_a_file_that_may_not_be_read_is_an_error_and_stays(
    store: ChunkStore, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {})])

    def refuse(*_: Any, **__: Any) -> blobs.Blob:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(blobs, "read", refuse)
        with pytest.raises(StoreError, match="Permission denied"):
            store.load([key])
    only(store.load([key]), Entry)


def test_a_deleted_chunk_takes_every_chain_that_saw_it(store: ChunkStore, folder: Path, make: Any) -> None:
    a, b, c = (row.id for row in store.add_chunks([NewChunk("default", 1, f"{x}\n", x) for x in "abc"]))
    keys = {
        "a": make.key(a),
        "b": make.key(b),
        "b after a": make.key(b, after=(a,), after_sha256=SHA((1,))),
        "c after a, b": make.key(c, after=(None, a, b), after_sha256=SHA((1, 2))),
        "c after b": make.key(c, after=(b,), after_sha256=SHA((2,))),
    }
    store.publish([(key, make.tensors(), {}) for key in keys.values()])
    gone = store.delete_chunk("default", a)
    assert set(gone) == {keys[name].digest for name in ("a", "b after a", "c after a, b")}
    left = [
        name for name, found in zip(keys, store.look_up(list(keys.values())), strict=True) if isinstance(found, Hit)
    ]
    assert left == ["b", "c after b"]
    assert len(files(folder)) == 2
    assert store.find_chunk("default", "a") is None
    assert [row.name for row in store.list_chunks("default")] == ["b", "c"]


def test_files_of_a_deleted_chunk_stay_away_after_a_power_cut(
    store: ChunkStore, folder: Path, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold its text. Each folder that one was in is synced after the last change."""
    one, other = make.key(chunk), make.key(chunk, tokens=(1, 2))
    store.publish([(key, make.tensors(), {}) for key in (one, other)])
    left: dict[Path, int] = {}
    sync = files_module.sync_folder

    def synced(path: Path) -> None:
        left[path] = len(list(path.glob("*.safetensors")))
        sync(path)

    monkeypatch.setattr(files_module, "sync_folder", synced)
    only(store.look_up([one]), Hit).path.write_bytes(b"damaged")
    assert store.load([one]) == [None]
    assert left == {folder / "damaged": 1, store._layout.entry(one.digest).parent: 0}
    left.clear()
    store.delete_chunk("default", chunk)
    places = (store._layout.entry(other.digest), store._layout.chunk(chunk))
    assert left == {folder / "damaged": 0, **{each.parent: 0 for each in places}}


def test_deleting_what_is_not_there_deletes_nothing(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk), make.tensors(), {})])
    assert store.delete_chunk("other", chunk) == ()
    assert store.delete_chunk("default", "0" * 32) == ()
    assert store.stats("default").entries == 1


def test_what_was_set_aside_of_a_deleted_chunk_goes_too(store: ChunkStore, folder: Path, chunk: str, make: Any) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {})])
    flip(only(store.look_up([key]), Hit).path)
    store.load([key])
    store.delete_chunk("default", chunk)
    assert files(folder) == []
    assert only(store.explain([key]), Miss).reason == "absent"
    assert store.damaged_count == 1


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of somebody else's, beside the store."""
    path = tmp_path / "precious.safetensors"
    path.write_text("mine")
    return path


@pytest.mark.parametrize("where", ["absolute", "relative"])
def test_a_row_that_leads_out_of_the_store_moves_nothing(
    store: ChunkStore, folder: Path, chunk: str, precious: Path, make: Any, where: str
) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {})])
    with store._index.write() as db:
        db.execute("update entries set file = ?", [str(precious) if where == "absolute" else f"../{precious.name}"])
    assert only(store.look_up([key]), Hit).path.is_relative_to(folder)
    only(store.load([key]), Entry)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("where", ["absolute", "relative", "another folder of the store"])
def test_a_record_of_damage_that_leads_out_of_its_folder_removes_nothing(
    store: ChunkStore, folder: Path, chunk: str, precious: Path, make: Any, where: str
) -> None:
    kept = make.key(None)
    store.publish([(kept, make.tensors(), {})])
    name = {"absolute": str(precious), "relative": f"../../{precious.name}"}.get(where, f"../{files(folder)[0]}")
    with store._index.write() as db:
        db.table("damage").insert(
            {"digest": "x", "namespace": "default", "chunks": f'["{chunk}"]', "file": name, "why": "", "created": ""}
        )
    store.delete_chunk("default", chunk)
    assert precious.read_text() == "mine"
    only(store.load([kept]), Entry)


def test_a_row_whose_digest_is_a_path_is_refused_and_removes_nothing(
    store: ChunkStore, chunk: str, precious: Path, make: Any
) -> None:
    key = make.key(chunk)
    store.publish([(key, make.tensors(), {})])
    with store._index.write() as db:
        db.execute("PRAGMA defer_foreign_keys=ON")
        for table in ("entries", "entry_chunks"):
            db.execute(f"update {table} set digest = '../precious'")
    with pytest.raises(StoreCorruptError, match=r"digest must be 32 hex digits; got '\.\./precious'"):
        store.delete_chunk("default", chunk)
    assert precious.read_text() == "mine"
    assert store.find_chunk("default", chunk), "all or none"


@pytest.mark.parametrize("role", ["own", "before"])
def test_an_entry_of_an_unknown_chunk_is_refused_and_leaves_nothing(
    store: ChunkStore, folder: Path, chunk: str, make: Any, role: str
) -> None:
    key = make.key("0" * 32) if role == "own" else make.key(chunk, after=("0" * 32,))
    with pytest.raises(UnknownChunkError, match="Register it again"):
        store.publish([(make.key(chunk), make.tensors(), {}), (key, make.tensors(), {})])
    assert files(folder) == []
    assert store.stats("default").entries == 0


def test_a_chunk_deleted_while_its_entry_was_written_leaves_nothing(
    store: ChunkStore, folder: Path, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = blobs.write

    def deleted_meanwhile(*args: Any, **kwargs: Any) -> str:
        with ChunkStore(folder) as other:
            other.delete_chunk("default", chunk)
        return write(*args, **kwargs)

    monkeypatch.setattr(blobs, "write", deleted_meanwhile)
    with pytest.raises(UnknownChunkError):
        store.publish([(make.key(chunk), make.tensors(), {})])
    assert files(folder) == []


def test_wrong_tensors_are_refused_and_leave_nothing(store: ChunkStore, folder: Path, chunk: str, make: Any) -> None:
    wrong = {blobs.TOKEN_IDS: make.tensors()["layer.000"]}
    with pytest.raises(InputError):
        store.publish([(make.key(chunk), make.tensors(), {}), (make.key(None), wrong, {})])
    assert files(folder) == []


def test_a_full_disk_is_an_error_that_leaves_the_store_as_it_was(
    store: ChunkStore, folder: Path, chunk: str, make: Any
) -> None:
    kept = make.key(None)
    store.publish([(kept, make.tensors(), {})])
    before = files(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StoreError, match="Free some space"):
            store.publish([(make.key(chunk), make.tensors(), {})])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == before
    only(store.load([kept]), Entry)
    store.publish([(make.key(chunk), make.tensors(), {})])
    only(store.load([make.key(chunk)]), Entry)


@pytest.mark.parametrize("step", ["place", "insert"])
def test_a_failure_at_any_step_leaves_the_store_as_it_was(
    store: ChunkStore, folder: Path, chunk: str, make: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = {"place": "braidsdk.store.files.Layout.place", "insert": "braidsdk.store.entries.insert"}[step]

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(StoreError, match="No space left"):
            store.publish([(make.key(chunk), make.tensors(), {})])
    assert files(folder) == []
    assert store.stats("default").entries == 0
    store.publish([(make.key(chunk), make.tensors(), {})])
    only(store.load([make.key(chunk)]), Entry)


def test_stats_count_what_the_store_holds(store: ChunkStore, chunk: str, make: Any) -> None:
    store.publish([(make.key(chunk), make.tensors(), {}), (make.key(None), make.tensors(), {})])
    stats = store.stats("default")
    assert (stats.chunks, stats.entries, stats.damaged) == (1, 2, 0)
    assert stats.bytes == 2 * sum(each.nbytes for each in make.tensors().values())
