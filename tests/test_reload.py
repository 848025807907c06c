"""A later process, another model, a damaged file: what is taken from the store, and what is not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from braidsdk import Braid
from braidsdk.cache.pool import PAGE_SIZE, Pool
from braidsdk.errors import StoreError
from braidsdk.store import ChunkStore

SYSTEM = "You answer questions from the documents."
TEXTS = ["Oslo is cold. " * 9, "Rome is warm.", "Bern is small, and so is Graz."]
NAMES = ["oslo", "rome", "bern"]


def fill(model: Path, store: Path, dtype: str = "float32") -> tuple[int, ...]:
    with Braid(model, store=store, device="cpu", dtype=dtype) as braid:
        rules = braid.register_system(SYSTEM, name="rules")
        braid.register_many(TEXTS, names=NAMES, anchor=rules)
        return braid.ask("Where?", chunks=["rules", "bern", "oslo"], max_new_tokens=8).token_ids


CHILD = """
import json, sys
from braidsdk import Braid
with Braid(sys.argv[1], store=sys.argv[2], device="cpu", dtype="float32") as braid:
    context = braid.compose(["rules", "bern", "oslo"])
    where = [chunk.where for chunk in context.explain().chunks]
    answer = context.ask("Where?", max_new_tokens=8)
    print(json.dumps([where, answer.token_ids, answer.usage.cached_tokens, len(context.input_ids)]))
"""


def test_a_second_process_answers_from_the_store(random_checkpoint: Path, tmp_path: Path) -> None:
    want = fill(random_checkpoint, tmp_path)
    command = [sys.executable, "-P", "-c", CHILD, str(random_checkpoint), str(tmp_path)]
    where, token_ids, cached, tokens = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert where == ["store"] * 3
    assert tuple(token_ids) == want
    assert cached == tokens


def test_entries_written_with_other_pages_are_laid_out_again(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_bytes: int
) -> None:
    want = fill(random_checkpoint, tmp_path)
    monkeypatch.setattr(
        "braidsdk.cache.pool.Pool.__init__.__kwdefaults__", {"page_size": 32, "zero_padding": True}, raising=True
    )
    with Braid(random_checkpoint, store=tmp_path, device="cpu", dtype="float32") as braid:
        (rules,) = braid.compose(["rules"]).explain().chunks
        assert rules.kv_bytes == page_bytes * 32 // PAGE_SIZE["cpu"], "a page of 32"
        answer = braid.ask("Where?", chunks=["rules", "bern", "oslo"], max_new_tokens=8)
        assert answer.token_ids == want
        assert answer.usage.cached_tokens == len(answer.prompt_ids) - answer.usage.computed_tokens > 100


def other_weights(folder: Path, make: Callable[..., Path]) -> Path:
    return make("other", seed=1)


def other_tokenizer(folder: Path, make: Callable[..., Path]) -> Path:
    copied = make("same")  # the same seed: the same weights
    spec = json.loads((copied / "tokenizer.json").read_text())
    spec["model"]["merges"].pop()
    (copied / "tokenizer.json").write_text(json.dumps(spec))
    return copied


def other_eps(folder: Path, make: Callable[..., Path]) -> Path:
    return make("other", rms_norm_eps=0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [(other_weights, "weights"), (other_eps, "weights"), (other_tokenizer, "tokenizer")],
    ids=["another model", "another rms_norm_eps", "another tokenizer"],
)
def test_what_another_model_computed_is_a_miss_with_its_reason(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[Path, Callable[..., Path]], Path],
    says: str,
) -> None:
    folder = make_checkpoint("first")
    fill(folder, tmp_path / "store")
    with Braid(change(folder, make_checkpoint), store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        explained = braid.compose(["rules", "bern", "oslo"]).explain()
        assert [row.hit for row in explained.chunks] == [False] * 3
        assert all(says in row.reason for row in explained.chunks), [row.reason for row in explained.chunks]


def test_the_same_weights_in_another_folder_are_a_hit(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    want = fill(make_checkpoint("first"), tmp_path / "store")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    with Braid(tmp_path / "moved", store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        context = braid.compose(["rules", "bern", "oslo"])
        assert all(row.hit for row in context.explain().chunks)
        assert context.ask("Where?", max_new_tokens=8).token_ids == want


def test_another_dtype_is_a_miss_with_its_reason(random_checkpoint: Path, tmp_path: Path) -> None:
    fill(random_checkpoint, tmp_path, "bfloat16")
    with Braid(random_checkpoint, store=tmp_path, device="cpu", dtype="float32") as braid:
        reasons = {row.reason for row in braid.compose(["rules", "oslo"]).explain().chunks}
        assert all("bfloat16" in reason and "float32" in reason for reason in reasons)


def test_another_namespace_sees_neither_chunks_nor_entries(random_checkpoint: Path, tmp_path: Path) -> None:
    fill(random_checkpoint, tmp_path)
    with Braid(random_checkpoint, store=tmp_path, device="cpu", dtype="float32", namespace="other") as braid:
        assert braid.chunks.list() == []
        rules, document = braid.register(SYSTEM, level=0), braid.register(TEXTS[0])
        row = braid.compose([rules, document]).explain().chunks[1]
        assert not row.hit
        assert row.reason == "never computed in this store", "nothing is told of the other namespace"


@pytest.mark.parametrize("how", ["a flipped bit", "truncated", "missing"])
def test_a_damaged_file_is_set_aside_counted_and_recomputed(
    random_checkpoint: Path, tmp_path: Path, pool_of: Callable[[Braid], Pool], how: str
) -> None:
    want = fill(random_checkpoint, tmp_path)
    files = sorted((tmp_path / "entries").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        data = bytearray(file.read_bytes())
        data[-100] ^= 4
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(data if how == "a flipped bit" else data[: len(data) // 2])
    with Braid(random_checkpoint, store=tmp_path, device="cpu", dtype="float32") as braid:
        answer = braid.ask("Where?", chunks=["rules", "bern", "oslo"], max_new_tokens=8)
        assert answer.token_ids == want
        assert answer.usage.cached_tokens == 0
        assert braid.stats().damaged == 3
        pool = pool_of(braid)
        pages = {page for entry in pool._entries.values() for page in entry.pages.tolist()}
        assert pool.used_bytes == pool.page_bytes * len(pages)  # nothing is lost of what was read in vain
    assert len(list((tmp_path / "damaged").iterdir())) == (0 if how == "missing" else 3)
    with Braid(random_checkpoint, store=tmp_path, device="cpu", dtype="float32") as braid:
        answer = braid.ask("Where?", chunks=["rules", "bern", "oslo"], max_new_tokens=8)
        assert answer.usage.cached_tokens > 0
        assert answer.token_ids == want


def test_pages_go_back_when_loading_fails_in_the_middle(
    random_checkpoint: Path, tmp_path: Path, pool_of: Callable[[Braid], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(random_checkpoint, tmp_path)
    with Braid(random_checkpoint, store=tmp_path, device="cpu", dtype="float32") as braid:
        free, honest = pool_of(braid).room, ChunkStore.stream

        def failing(self: ChunkStore, keys: list, place: Callable) -> Iterator[object]:
            yield from (found for found, _ in zip(honest(self, keys, place), range(2), strict=False))
            raise StoreError("out of luck")

        context = braid.compose(["rules", "bern", "oslo"])
        with monkeypatch.context() as patch:
            patch.setattr(ChunkStore, "stream", failing)
            with pytest.raises(StoreError, match="out of luck"):
                context.prepare()
        assert pool_of(braid).room == free
        assert context.prepare() == 0, "what was read is there, and the rest is read again"
