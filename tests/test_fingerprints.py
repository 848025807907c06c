"""The fingerprint of a checkpoint's content, and the file that remembers it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from braidsdk import Braid
from braidsdk.models import fingerprints
from braidsdk.models.config import Family, read_config
from braidsdk.models.registry import FAMILIES, load_model

CPU = torch.device("cpu")
Make = Callable[..., Path]
Weights = dict[str, torch.Tensor]


def edit_json(path: Path, *without: str, **changes: object) -> Path:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in without}))
    return path.parent


def edit_weights(folder: Path, edit: Callable[[Weights], object], file: str = "model.safetensors") -> Path:
    weights = load_file(folder / file)
    edit(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})
    return folder


def sharded(folder: Path, to: Path) -> Path:
    """The same checkpoint in shards of at most 100 KB."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    Qwen3ForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(to, max_shard_size="100KB")
    assert len(list(to.glob("*.safetensors"))) > 5
    return to


def fingerprint(folder: Path, dtype: torch.dtype | None = None, remembered: Path | None = None) -> str:
    return load_model(folder, device=CPU, dtype=dtype, fingerprints=remembered).fingerprint


def test_the_fingerprint_is_of_the_content_alone(random_checkpoint: Path, tmp_path: Path) -> None:
    first = fingerprint(random_checkpoint)
    assert fingerprint(sharded(random_checkpoint, tmp_path / "sharded")) == first
    assert fingerprint(random_checkpoint, torch.bfloat16) == first
    moved = shutil.copytree(random_checkpoint, tmp_path / "moved")
    assert fingerprint(moved) == first
    edit_weights(moved, lambda w: w["model.norm.weight"].view(torch.int32)[95:].bitwise_xor_(1))
    assert fingerprint(moved) != first


def test_the_same_bytes_under_another_dtype_are_other_weights(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "moved")
    halves = {name: w.bfloat16().clamp(-1, 1) for name, w in load_file(folder / "model.safetensors").items()}
    edit_weights(folder, lambda w: w.update(halves))
    first = fingerprint(folder, torch.float32)
    edit_weights(folder, lambda w: w.update({name: w.view(torch.float16) for name, w in halves.items()}))
    assert fingerprint(folder, torch.float32) != first


def test_swapped_weights_of_one_shape_change_the_fingerprint(random_checkpoint: Path, tmp_path: Path) -> None:
    def swap(weights: Weights) -> None:
        one, other = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
        weights[one], weights[other] = weights[other], weights[one]

    moved = edit_weights(shutil.copytree(random_checkpoint, tmp_path / "moved"), swap)
    assert fingerprint(moved) != fingerprint(random_checkpoint)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by an item for each piece of weights that is checked and hashed."""
    pieces: list[str] = []
    check = torch.aminmax

    def count(values: torch.Tensor) -> object:
        pieces.append("piece")
        return check(values)

    monkeypatch.setattr(torch, "aminmax", count)
    return pieces


def test_a_second_opening_does_not_hash_again(
    random_checkpoint: Path, tmp_path: Path, settled: None, hashed: list[str]
) -> None:
    with Braid(random_checkpoint, store=tmp_path / "store", device="cpu") as braid:
        braid.register_system("rules", name="rules")
    assert hashed
    hashed.clear()
    with Braid(random_checkpoint, store=tmp_path / "store", device="cpu") as braid:
        assert braid.compose(["rules"]).explain().chunks[0].hit, "the same fingerprint"
    assert not hashed


def flip(path: Path, keep_times: bool = False) -> None:
    """One bit of the last weight, in place: same file, same size."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True], ids=["", "and its modification time is set back"])
def test_a_changed_file_is_hashed_again(make_checkpoint: Make, tmp_path: Path, settled: None, keep_times: bool) -> None:
    folder, file = make_checkpoint(), tmp_path / "remembered"
    first = fingerprint(folder, remembered=file)
    flip(folder / "model.safetensors", keep_times)
    changed = fingerprint(folder, remembered=file)
    assert changed != first
    assert changed == fingerprint(folder)


def test_a_replaced_file_or_another_config_is_hashed_again(
    make_checkpoint: Make, tmp_path: Path, settled: None, hashed: list[str]
) -> None:
    folder, known = make_checkpoint(tie_word_embeddings=True), tmp_path / "remembered"
    fingerprint(folder, remembered=known)
    weights = folder / "model.safetensors"
    shutil.copy2(weights, tmp_path / "copy")
    (tmp_path / "copy").rename(weights)
    hashed.clear()
    first = fingerprint(folder, remembered=known)
    assert hashed
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert fingerprint(folder, remembered=known) == first
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert fingerprint(folder, remembered=known) != first


def test_files_that_changed_just_now_are_not_remembered(make_checkpoint: Make, tmp_path: Path) -> None:
    file = tmp_path / "remembered"
    fingerprint(make_checkpoint(), remembered=file)
    assert not file.exists()


def test_files_that_change_while_they_are_read_are_not_remembered(
    make_checkpoint: Make, tmp_path: Path, settled: None, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = make_checkpoint(), tmp_path / "remembered"
    from braidsdk.models import weights

    finish = weights.Weights.finish
    with monkeypatch.context() as patch:
        patch.setattr(weights.Weights, "finish", lambda self: (flip(folder / "model.safetensors"), finish(self))[1])
        fingerprint(folder, remembered=file)
    hashed.clear()
    fingerprint(folder, remembered=file)
    assert hashed


def other_fingerprint(text: str) -> str:
    records = json.loads(text)
    (key, (fingerprint, check)) = records.popitem()
    return json.dumps({key: [fingerprint[::-1], check]})


@pytest.mark.parametrize(
    "damage",
    [lambda text: "", lambda text: text[:20], lambda text: "[1]", other_fingerprint],
    ids=["empty", "cut off", "not an object", "another fingerprint"],
)
def test_a_damaged_file_remembers_nothing(
    make_checkpoint: Make, tmp_path: Path, settled: None, hashed: list[str], damage: Callable[[str], str]
) -> None:
    folder, file = make_checkpoint(), tmp_path / "remembered"
    first = fingerprint(folder, remembered=file)
    file.write_text(damage(file.read_text()))
    hashed.clear()
    assert fingerprint(folder, remembered=file) == first
    assert hashed
    hashed.clear()
    assert fingerprint(folder, remembered=file) == first
    assert not hashed


def test_the_file_stays_small(tmp_path: Path, settled: None) -> None:
    file = tmp_path / "remembered"
    for number in range(fingerprints._KEPT + 5):
        checkpoint = [tmp_path / f"{number}"]
        checkpoint[0].touch()
        fingerprints.remember(file, fingerprints.stamp(checkpoint), checkpoint, f"{number:032}")
    assert len(json.loads(file.read_text())) == fingerprints._KEPT
    assert fingerprints.recall(file, fingerprints.stamp(checkpoint)) == f"{number:032}"
    assert not list(tmp_path.glob("remembered?*")), "temporary files stay behind"


# Configurations, tokenizers and templates

OPEN = """
import sys
from braidsdk import Braid
with Braid(sys.argv[1], store=sys.argv[2], device="cpu") as braid:
    docs = [braid.register_system("Be brief."), *braid.register_many(["One fact: 12.", "<|im_end|>"], progress=False)]
    context = braid.compose(docs)
    answer = context.ask("Which?", max_new_tokens=6)
    print(answer.prompt_ids, answer.token_ids, braid.compose(docs[1:]).input_ids)
    said = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": answer.text}]
    print(context.ask("And?", history=said, max_new_tokens=6).prompt_ids)
    sys.stderr.write(str("transformers" in sys.modules))
    print(context.prompt_ids("Which?", history=[{"role": r, "content": "A"} for r in ("user", "assistant")]))
"""


def test_a_second_process_imports_no_transformers_and_finds_the_same(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint()
    time.sleep(fingerprints.SETTLED_NS / 1e9 + 0.1)
    command = [sys.executable, "-c", OPEN, str(folder), str(tmp_path / "store")]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert second.stdout == first.stdout
    assert (first.stderr, second.stderr) == ("True", "False")


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("qwen3", {"rope_type": "default"}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ("mistral", {"rope_type": "linear", "factor": 3.0}),
        ("llama", None),
    ],
)
def test_a_remembered_configuration_is_the_one_that_was_read(
    make_checkpoint: Make,
    tmp_path: Path,
    settled: None,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    rope: dict[str, object] | None,
) -> None:
    changes = {"rope_parameters": {**rope, "rope_theta": 1e6}} if rope else {}
    folder = make_checkpoint(family=family, **changes)
    (folder / "generation_config.json").write_text('{"top_p": 0.95, "eos_token_id": [1021, 1019]}')
    first = read_config(folder, FAMILIES[family], tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.delattr(Family, "config_class")
        again = read_config(folder, FAMILIES[family], tmp_path / "file")
    assert torch.equal(again.inv_freq, first.inv_freq)
    assert {**vars(again), "inv_freq": None} == {**vars(first), "inv_freq": None}
    for name, change in (("generation_config.json", {"top_p": 0.5}), ("config.json", {"rms_norm_eps": 0.5})):
        edit_json(folder / name, **change)
        changed = read_config(folder, FAMILIES[family], tmp_path / "file")
        assert changed.numbers == read_config(folder, FAMILIES[family]).numbers
    assert (changed.numbers.generation.top_p, changed.eps) == (0.5, 0.5)
