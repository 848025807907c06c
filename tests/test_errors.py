"""Every error: met through the public API, it says what to do, fits on a screen, and holds no long text of the user."""

import errno
import os
import pickle
import sqlite3
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from braidsdk import Braid, BraidError, errors
from braidsdk.engine import runner
from braidsdk.engine.scheduler import Scheduler
from braidsdk.errors import LONGEST_MESSAGE, did_you_mean, shown
from braidsdk.store import ChunkStore
from braidsdk.store.archive import import_chunks
from braidsdk.testing import FakeBraid

SECRET = "a long text of the user, private " * 200
"""Far longer than any message may be."""


class Scene:
    """What a case needs to go wrong with."""

    def __init__(self, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checkpoint = checkpoint
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.store = folder / "store"

    def open(self, **options: Any) -> Braid:
        return Braid(options.pop("model", self.checkpoint), store=self.store, device="cpu", **options)

    def copy(self) -> Path:
        """A checkpoint that may be spoilt."""
        made = self.folder / "copy"
        made.mkdir()
        for path in self.checkpoint.iterdir():
            (made / path.name).write_bytes(path.read_bytes())
        return made

    def index(self, *statements: str) -> None:
        """Change the store's index behind its back."""
        with sqlite3.connect(self.store / "index.db") as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()


def base_error(scene: Scene) -> None:
    with FakeBraid() as braid:
        _ = braid.compose([]).stream("Well?").answer


def unusable_input(scene: Scene) -> None:
    scene.open(dtype=SECRET)


def empty_text(scene: Scene) -> None:
    with FakeBraid() as braid:
        braid.register(" " * 5000)


def too_long(scene: Scene) -> None:
    with scene.open() as braid:
        braid.register(SECRET)


def name_taken(scene: Scene) -> None:
    with FakeBraid(namespace="x" * 200) as braid:
        braid.register("one", name=SECRET[:500])
        braid.register(SECRET, name=SECRET[:500])


def unknown_chunk(scene: Scene) -> None:
    with FakeBraid(namespace="x" * 200) as braid:
        braid.register("one", name=SECRET[:500])
        braid.ask("Well?", chunks=[SECRET[:499]])


def deleted_chunks(scene: Scene) -> None:
    with FakeBraid() as braid:
        chunks = braid.register_many([f"{n}" for n in range(50)], names=[f"{n} {SECRET}"[:500] for n in range(50)])
        context = braid.compose(chunks)
        braid.chunks.delete_many(chunks)
        context.ask("Well?")


def unknown_mode(scene: Scene) -> None:
    with FakeBraid() as braid:
        braid.compose([], mode="anchord" + SECRET)


def no_checkpoint(scene: Scene) -> None:
    scene.open(model=SECRET[:3000])


def no_hub(scene: Scene) -> None:
    scene.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scene.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    scene.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(scene.folder / "cache"))
    scene.open(model="nobody/no-such-model")


def unsupported(scene: Scene) -> None:
    folder = scene.copy()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    scene.open(model=folder)


def wrong_weights(scene: Scene) -> None:
    folder = scene.copy()
    weights = {
        f"{n}.{name}": value.clone()
        for n in range(20)
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scene.open(model=folder)


def store_error(scene: Scene) -> None:
    with scene.open() as braid:
        rules = braid.register_system("rules")
        scene.monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        braid.register("text", anchor=rules)


def store_path(scene: Scene) -> None:
    scene.store.write_text("a file")
    scene.open()


def read_only_store(scene: Scene) -> None:
    scene.open().close()
    scene.monkeypatch.setattr("os.open", refusing(os.open))
    with scene.open() as braid:
        braid.register("text")


def refusing(opened: Any) -> Any:
    """`os.open` on a file system that can't be written."""

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return int(opened(path, flags, *more))

    return refuse


def replaced_store(scene: Scene) -> None:
    with scene.open() as braid:
        scene.store.rename(scene.store.with_name("elsewhere"))
        braid.register("text")


def newer_store(scene: Scene) -> None:
    scene.open().close()
    scene.index(
        "insert into _sqlite_migrations (migration_set, name, applied_at) values ('braidsdk-store', 'm999_new', 'now')"
    )
    scene.open()


def corrupt_store(scene: Scene) -> None:
    with scene.open() as braid:
        braid.register("text")
    scene.index("update chunks set text = 'other'")
    with scene.open() as braid:
        braid.chunks.list()


def full_disk(scene: Scene) -> None:
    usage = namedtuple("usage", "total used free")
    scene.monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1000))
    with FakeBraid() as braid:
        braid.register_system(SECRET)


def disk_that_fills_up(scene: Scene) -> None:
    with scene.open() as braid:
        rules = braid.register_system("rules")
        scene.monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        braid.register("text", anchor=rules)


def no_archive(scene: Scene) -> None:
    (scene.folder / "no.tar").write_bytes(b"junk" * 500)
    with ChunkStore(scene.folder / "store") as store:
        import_chunks(store, scene.folder / "no.tar")


def collision(scene: Scene) -> None:
    scene.monkeypatch.setattr("braidsdk.store.chunks.chunk_id", lambda *_: "0" * 32)
    with FakeBraid() as braid:
        braid.register("one")
        braid.register("two")


def no_numbers(scene: Scene) -> None:
    with FakeBraid() as braid:
        scene.monkeypatch.setattr("braidsdk.engine.runner.forward", lambda *_: torch.full((1, 261), torch.nan))
        braid.ask("Well?", chunks=[])


def full_queue(scene: Scene) -> None:
    held, forward = threading.Event(), runner.forward
    scene.monkeypatch.setattr(runner, "forward", lambda *given: held.wait() and forward(*given))
    with FakeBraid(max_queue=1) as braid:
        streams = [braid.stream("Well?", chunks=[]) for _ in range(70)]
        readers = [threading.Thread(target=lambda stream=stream: [*stream]) for stream in streams[:-1]]
        scene.monkeypatch.setattr(threading, "excepthook", lambda _: None)  # most of them are refused
        for reader in readers:
            reader.start()
            time.sleep(0.002)
        last = threading.Timer(0.2, held.set)
        last.start()
        try:
            list(streams[-1])
        finally:
            for thread in (*readers, last):
                thread.join()


def too_late(scene: Scene) -> None:
    with FakeBraid() as braid:
        braid.ask("Well?", chunks=[], timeout_s=1e-6)


def failing_engine(scene: Scene) -> None:
    with FakeBraid() as braid:
        scene.monkeypatch.setattr(Scheduler, "next", lambda *_: 1 / 0)
        braid.ask("Well?", chunks=[])


def forked(scene: Scene) -> None:
    with FakeBraid() as braid:
        scene.monkeypatch.setattr("os.getpid", lambda: -1)
        try:
            braid.ask("Well?", chunks=[])
        finally:
            scene.monkeypatch.undo()


def full_pool(scene: Scene) -> None:
    with FakeBraid(pool_bytes=4096) as braid:
        braid.register(SECRET)


def closed(scene: Scene) -> None:
    braid = FakeBraid()
    braid.close()
    braid.register("text")


CASES: list[tuple[Callable[[Scene], None], type[BraidError], str]] = [
    (base_error, errors.BraidError, "Read the stream to its end"),
    (unusable_input, errors.InputError, r"dtype must be .*; got 'a long text.*\.\.\.\."),
    (empty_text, errors.EmptyTextError, "must hold something besides white space; got 5000 characters"),
    (too_long, errors.WindowExceededError, r"fewer than 2,048 tokens, .* window; got .*Split it"),
    (name_taken, errors.NameTakenError, "Pass replace=True to move the name, or choose another"),
    (unknown_chunk, errors.UnknownChunkError, "No chunk .* Did you mean"),
    (
        deleted_chunks,
        errors.UnknownChunkError,
        r"Deleted meanwhile: .* \[\.\.\.\] .*Register it again, or compose without",
    ),
    (unknown_mode, errors.UnknownModeError, "mode must be one of auto, exact, isolated, anchored, "),
    (no_checkpoint, errors.ModelNotFoundError, r"No checkpoint at .* \[\.\.\.\] .* or one of braid-tiny"),
    (no_hub, errors.HubError, "HF_ENDPOINT"),
    (unsupported, errors.UnsupportedModelError, "must be one of llama, mistral, qwen2, qwen3; got 'gpt2'. Choose"),
    (wrong_weights, errors.WeightsError, "such as .*Use the config.json that belongs to these weights"),
    (store_error, errors.StoreError, "Input/output error. Free some space or correct what fails"),
    (store_path, errors.StorePathError, "a file in the way. Choose another path"),
    (read_only_store, errors.StoreReadOnlyError, "can only be read. Open it where it can be written"),
    (replaced_store, errors.StoreReplacedError, "removed or replaced. Nothing was kept. Open the store again"),
    (
        newer_store,
        errors.StoreVersionError,
        "migrations m999_new: a newer version wrote it, .*Update braidsdk, or open another store",
    ),
    (corrupt_store, errors.StoreCorruptError, "braid store repair"),
    (full_disk, errors.StoreFullError, "must have room for .* got .* free. Free some space"),
    (disk_that_fills_up, errors.StoreFullError, "No space left on device. Free some space"),
    (no_archive, errors.ArchiveError, "must be an archive that `braid store export` wrote; .* Nothing was imported"),
    (collision, errors.HashCollisionError, "Change the text by a character"),
    (no_numbers, errors.NumericsError, "Logits must be finite; .* open the model with dtype='float32'"),
    (full_pool, errors.PoolFullError, "the pool's limit; they need .* larger pool_bytes"),
    (full_queue, errors.QueueFullError, "queue must hold fewer than 1 .* larger max_queue"),
    (too_late, errors.DeadlineError, "within timeout_s=1e-06; .* Ask with a larger timeout_s"),
    (failing_engine, errors.EngineError, "ZeroDivisionError: .* Open another Braid"),
    (forked, errors.ForkedError, "in the process that opened it; .* Open another Braid here"),
    (closed, errors.ClosedError, "This Braid is closed. Open a new one"),
]


@pytest.mark.parametrize(("meet", "kind", "says"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_every_error_says_what_to_do_on_one_screen(
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    meet: Callable[[Scene], None],
    kind: type[BraidError],
    says: str,
) -> None:
    with pytest.raises(kind, match=says) as caught:
        meet(Scene(random_checkpoint, tmp_path, monkeypatch))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert len(message) <= LONGEST_MESSAGE
    assert message.endswith((".", "?", ")"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_every_class_is_met() -> None:
    abstract = {errors.ModelError}  # only its kinds are raised
    known = {value for value in vars(errors).values() if isinstance(value, type)}
    assert known - abstract == {kind for _, kind, _ in CASES}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda braid: braid.compose([], mode="anchored "), "Did you mean 'anchored'?"),
        (lambda braid: braid.compose([], mode="Exact"), "Did you mean 'exact'?"),
        (lambda braid: braid.ask("x", chunks=[], max_tokens=5), "Did you mean 'max_new_tokens'?"),
        (lambda braid: braid.ask("x", chunks=[], temprature=1), "Did you mean 'temperature'?"),
        (lambda braid: braid.ask("x", chunks=["refund-plicy"]), "Did you mean 'refund-policy'?"),
        (lambda braid: braid.register_many([], on_error="Skip"), "Did you mean 'skip'?"),
        (lambda _: Braid("braid_tiny"), "Did you mean 'braid-tiny'?"),
        (lambda _: Braid("braid-tiny", device="cuda0"), "Did you mean 'cuda'?"),
        (lambda _: Braid("braid-tiny", dtype="bfloat"), "Did you mean 'bfloat16'"),
    ],
)
def test_misspelt_words_get_a_suggestion(call: Callable[[Braid], Any], says: str) -> None:
    with FakeBraid() as braid:
        braid.register("text", name="refund-policy")
        with pytest.raises((BraidError, TypeError)) as caught:
            call(braid)
    assert says in str(caught.value)


def test_nothing_is_suggested_where_nothing_is_close() -> None:
    assert did_you_mean("zzz", ["exact", "anchored"]) == did_you_mean(None, []) == ""


def test_what_is_shown_is_short_and_ascii() -> None:
    assert shown("ä") == "'\\xe4'"
    assert len(shown("x" * 500)) == 80
    assert shown("x" * 500).endswith("...")


def test_a_long_message_keeps_its_start_and_its_remedy() -> None:
    message = str(errors.StoreError("Expected this, " + "x" * 5000 + " and do that."))
    assert len(message) <= LONGEST_MESSAGE
    assert message.startswith("Expected this, ")
    assert message.endswith(" and do that.")
