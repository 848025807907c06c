"""A corpus moves to another store, and nothing else does."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from braidsdk.errors import ArchiveError, BraidError, NameTakenError, StoreError, StoreFullError
from braidsdk.store import ChunkStore, EntryKey, Limit, sha256_of_tokens
from braidsdk.store import archive as archives
from braidsdk.store.archive import export_chunks, import_chunks


@pytest.fixture
def corpus(store: ChunkStore, make: Any) -> list[EntryKey]:
    """Rules, three texts of which two were computed after the rules, one after another text, and the bare header."""
    rules = store.add_chunk(namespace="default", level=0, text="rules", name="rules").id
    ids = [
        store.add_chunk(namespace="default", level=1, text=f"text {n}", name=f"name {n}", metadata={"n": n}).id
        for n in range(3)
    ]
    store.update_chunk("default", ids[1], name="other name", pinned=True)
    store.add_chunk(namespace="other", level=1, text="of another namespace")
    keys = [make.key(None, level=0), make.key(rules, level=0)]
    keys += [make.key(each, after=(rules,), after_sha256=sha256_of_tokens((1,))) for each in ids[:2]]
    keys.append(make.key(ids[2], after=(ids[0],), after_sha256=sha256_of_tokens((2,))))
    store.publish([(key, make.tensors(n), {}) for n, key in enumerate(keys)])
    return keys


@pytest.fixture
def archive(store: ChunkStore, corpus: list[EntryKey], tmp_path: Path) -> Path:
    export_chunks(store, tmp_path / "corpus.tar", "default")
    return tmp_path / "corpus.tar"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Any:
    with ChunkStore(tmp_path / "elsewhere") as opened:
        yield opened


def rows(store: ChunkStore) -> list[Any]:
    return [(row.text, row.names, row.metadata, row.level, row.pinned) for row in store.list_chunks("default")]


def test_a_corpus_moves(
    store: ChunkStore, elsewhere: ChunkStore, corpus: list[EntryKey], archive: Path, make: Any
) -> None:
    done = import_chunks(elsewhere, archive)
    assert (done.chunks, done.entries, done.new_chunks, done.new_entries) == (4, 5, 4, 5)
    assert rows(elsewhere) == rows(store)
    assert elsewhere.namespaces() == ["default"]
    for number, entry in enumerate(elsewhere.load(corpus)):
        assert entry is not None
        assert make.content(entry.tensors) == make.content(make.tensors(number))
    assert elsewhere.check(1.0).is_sound
    assert not list((elsewhere.path / "tmp").glob("*.part"))
    again = import_chunks(elsewhere, archive)
    assert (again.new_chunks, again.new_entries) == (0, 0)
    assert archive.stat().st_mode & 0o777 == 0o600


def test_named_chunks_move_with_the_rules_before_them(
    store: ChunkStore, elsewhere: ChunkStore, corpus: list[EntryKey], tmp_path: Path
) -> None:
    done = export_chunks(
        store, tmp_path / "some.tar", "default", ids=[str(corpus[2].chunk_id), str(corpus[4].chunk_id)]
    )
    assert (done.chunks, done.entries) == (3, 4)
    import_chunks(elsewhere, tmp_path / "some.tar")
    assert [row[0] for row in rows(elsewhere)] == ["rules", "text 0", "text 2"]
    assert [bool(hit) for hit in elsewhere.look_up(corpus)] == [True, True, True, False, True]


def test_any_tar_program_reads_it(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        manifest = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
        for name, digest in manifest["sha256"].items():
            assert hashlib.sha256(tar.extractfile(name).read()).hexdigest() == digest  # type: ignore[union-attr]


def test_an_archive_is_signed_and_verified(
    store: ChunkStore, elsewhere: ChunkStore, corpus: list[EntryKey], archive: Path, tmp_path: Path
) -> None:
    signed = tmp_path / "signed.tar"
    assert export_chunks(store, signed, "default", key="secret").authenticated
    for file, key, why in ((signed, "other", "another key"), (archive, "secret", "is not signed")):
        with pytest.raises(ArchiveError, match=why):
            import_chunks(elsewhere, file, key=key)
    assert rows(elsewhere) == []
    assert import_chunks(elsewhere, signed, key="secret").authenticated
    assert not import_chunks(elsewhere, signed).authenticated


def rewritten(archive: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> Path:
    """The archive with other members."""
    with tarfile.open(archive) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive


def renamed(number: int, name: str) -> Callable[[list[Any]], None]:
    def change(members: list[Any]) -> None:
        members[number][0].name = name

    return change


def linked(members: list[Any]) -> None:
    members[0][0].type, members[0][0].linkname = tarfile.SYMTYPE, "/etc/passwd"


def doubled(members: list[Any]) -> None:
    members.insert(1, members[0])


def flipped(number: int) -> Callable[[list[Any]], None]:
    def change(members: list[Any]) -> None:
        info, content = members[number]
        members[number] = info, content[:-1] + bytes([content[-1] ^ 1])

    return change


def with_manifest(**changes: Any) -> Callable[[list[Any]], None]:
    def change(members: list[Any]) -> None:
        info, content = members[-1]
        members[-1] = info, json.dumps(json.loads(content) | changes).encode()

    return change


def honest(change: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
    """A change whose digests are right."""

    def both(members: list[Any]) -> None:
        change(members)
        digests = {info.name: hashlib.sha256(content).hexdigest() for info, content in members[:-1]}
        with_manifest(sha256=digests)(members)

    return both


def swapped(members: list[Any]) -> None:
    members[0], members[1] = (members[0][0], members[1][1]), (members[1][0], members[0][1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (renamed(0, "../evil.json"), "which no export writes"),
        (renamed(0, "/tmp/evil.json"), "which no export writes"),
        (renamed(0, "chunks/ab/../../../x.json"), "which no export writes"),
        (renamed(0, "entries/00/" + "0" * 32 + ".pickle"), "which no export writes"),
        (linked, "is no file"),
        (doubled, "is there twice"),
        (flipped(0), "differs"),
        (flipped(4), "differs"),
        (flipped(-1), "can't be read"),
        (lambda members: members.pop(), "must end with a manifest"),
        (lambda members: members.pop(0), "differs"),
        (lambda members: members.append(members.pop(0)), "which no export writes"),
        (with_manifest(version=2), "of version 1"),
        (with_manifest(format=99), "entries of format"),
        (with_manifest(sha256=[]), "can't be read"),
        (honest(flipped(0)), "must be a chunk's file"),
        (honest(flipped(5)), "must be an entry's file"),
        (honest(swapped), "must be a chunk's file"),
        (honest(renamed(5, "entries/00/" + "0" * 32 + ".safetensors")), "must be an entry's file"),
    ],
)
def test_an_archive_that_was_changed_imports_nothing(
    elsewhere: ChunkStore, archive: Path, tmp_path: Path, change: Callable[[list[Any]], None], why: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    rewritten(archive, change)
    with pytest.raises(ArchiveError, match=why):
        import_chunks(elsewhere, archive)
    assert rows(elsewhere) == []
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left"


@pytest.mark.parametrize("cut", [0, 100, 512, 3000, -11_000])
def test_an_archive_that_was_cut_off_imports_nothing(elsewhere: ChunkStore, archive: Path, cut: int) -> None:
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(ArchiveError):
        import_chunks(elsewhere, archive)
    assert rows(elsewhere) == []


def test_a_header_that_claims_gigabytes_is_refused(elsewhere: ChunkStore, archive: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**33
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(ArchiveError, match="a header claims"):
        import_chunks(elsewhere, archive)


def test_another_model_is_refused_unless_it_is_wanted(
    elsewhere: ChunkStore, corpus: list[EntryKey], archive: Path, make: Any
) -> None:
    other = replace(make.model, weights="ff" * 16)
    elsewhere.publish([(make.key(None, model=other), make.tensors(), {})])
    with pytest.raises(ArchiveError, match="allow any model"):
        import_chunks(elsewhere, archive)
    assert import_chunks(elsewhere, archive, any_model=True).new_entries == 5


def test_the_models_are_those_of_the_entries_whatever_the_manifest_says(
    elsewhere: ChunkStore, archive: Path, make: Any
) -> None:
    elsewhere.publish([(make.key(None, model=replace(make.model, weights="ff" * 16)), make.tensors(), {})])
    with pytest.raises(ArchiveError, match="allow any model"):
        import_chunks(elsewhere, rewritten(archive, with_manifest(models={})))


def test_an_entry_of_a_chunk_that_is_deleted_meanwhile_stays_out(
    elsewhere: ChunkStore, corpus: list[EntryKey], archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def register(*given: Any, **options: Any) -> int:
        new = registered(*given, **options)
        elsewhere.delete_chunk("default", str(corpus[1].chunk_id))
        return new

    registered = archives._register
    monkeypatch.setattr(archives, "_register", register)
    assert import_chunks(elsewhere, archive).new_entries == 2
    assert [bool(hit) for hit in elsewhere.look_up(corpus)] == [True, False, False, False, True]
    assert elsewhere.check(1.0).is_sound


def test_another_export_is_left_alone(store: ChunkStore, corpus: list[EntryKey], tmp_path: Path) -> None:
    (tmp_path / ".x.tar.part").write_text("another's")
    with pytest.raises(ArchiveError, match="another export"):
        export_chunks(store, tmp_path / "x.tar", "default")
    assert (tmp_path / ".x.tar.part").read_text() == "another's"


def test_very_many_headers_in_a_row_are_refused(elsewhere: ChunkStore, archive: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 0
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 4000 + bytes(1024))
    with pytest.raises(ArchiveError):
        import_chunks(elsewhere, archive)


def test_an_archive_larger_than_the_disk_is_refused(
    elsewhere: ChunkStore, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChunkStore, "free_bytes", 10)
    with pytest.raises(StoreFullError, match="must have room"):
        import_chunks(elsewhere, archive)


def test_names_that_are_taken_are_refused_or_moved(elsewhere: ChunkStore, archive: Path) -> None:
    elsewhere.add_chunk(namespace="default", level=1, text="mine", name="name 1")
    with pytest.raises(NameTakenError):
        import_chunks(elsewhere, archive)
    assert [row[0] for row in rows(elsewhere)] == ["mine"]
    import_chunks(elsewhere, archive, replace=True)
    found = elsewhere.find_chunk("default", "name 1")
    assert found is not None
    assert found.text == "text 1"
    assert len(elsewhere.versions("default", "name 1")) == 2


def test_an_import_keeps_the_limit(elsewhere: ChunkStore, corpus: list[EntryKey], archive: Path) -> None:
    elsewhere.set_limit(Limit(max_bytes=1))
    import_chunks(elsewhere, archive)
    assert elsewhere.stats("default").entries == 1, "the entry of the pinned chunk"


def test_files_that_are_there_or_can_not_be_written(store: ChunkStore, archive: Path, tmp_path: Path) -> None:
    before = archive.read_bytes()
    for target, why in ((archive, "must not be there yet"), (tmp_path / "no" / "x.tar", "must be writable")):
        with pytest.raises(ArchiveError, match=why):
            export_chunks(store, target, "default")
    assert archive.read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


def test_a_damaged_entry_is_not_exported(store: ChunkStore, corpus: list[EntryKey], tmp_path: Path) -> None:
    (hit,) = store.look_up(corpus[:1])
    assert hit is not None
    hit.path.write_bytes(hit.path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="braid store repair"):
        export_chunks(store, tmp_path / "x.tar", "default")
    assert not list(tmp_path.glob("*.tar*"))


def test_a_full_disk_imports_nothing(elsewhere: ChunkStore, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StoreFullError):
            import_chunks(elsewhere, archive)
    assert rows(elsewhere) == []
    assert import_chunks(elsewhere, archive).new_chunks == 4


def test_bits_anywhere_are_noticed_or_do_not_matter(elsewhere: ChunkStore, archive: Path) -> None:
    """Padding of the tar file carries nothing; of all else every flipped bit is refused."""
    content = archive.read_bytes()
    refused = 0
    for at in range(0, len(content), 97):
        archive.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            import_chunks(elsewhere, archive)
        except BraidError:
            refused += 1
            assert rows(elsewhere) == [] or elsewhere.check(1.0).is_sound
        assert elsewhere.check(1.0).is_sound
    assert refused > len(content) // 97 // 3
