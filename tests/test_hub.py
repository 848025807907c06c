"""Checkpoints from the hub: what is downloaded, and which error comes if it is not."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from braidsdk import Braid
from braidsdk.errors import HubError, InputError
from braidsdk.models.registry import find_checkpoint


@pytest.fixture
def hub_cache(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the random checkpoint as Qwen/Qwen3-0.6B, and no network."""
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--Qwen--Qwen3-0.6B"
    shutil.copytree(random_checkpoint, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_hub_name_opens_from_the_hubs_cache_without_network(hub_cache: Path, tmp_path: Path) -> None:
    with Braid("Qwen/Qwen3-0.6B", store=tmp_path / "store", device="cpu") as braid:
        assert braid.ask("Well?", chunks=[braid.register("A fact.")], max_new_tokens=2).token_ids


@pytest.mark.parametrize(("model", "revision"), [("Qwen/Qwen3-1.7B", None), ("Qwen/Qwen3-0.6B", "v2")])
def test_offline_and_not_in_the_cache_names_the_cache(hub_cache: Path, model: str, revision: str | None) -> None:
    with pytest.raises(HubError, match=rf"{model}.*HF_HUB_OFFLINE is set.*Cache: {hub_cache}"):
        find_checkpoint(model, revision)


def test_a_folder_of_that_name_is_not_looked_for_on_the_hub(
    random_checkpoint: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(random_checkpoint, tmp_path / "Qwen" / "Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")
    with pytest.raises(InputError, match="revision must be None unless the model comes from the hub"):
        find_checkpoint("Qwen/Qwen3-0.6B", "main")
    with pytest.raises(InputError, match="revision"):
        find_checkpoint("braid-tiny", "main")


def test_only_safetensors_and_their_description_are_downloaded(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **arguments: object) -> str:
        asked.update(arguments, name=name)
        return str(random_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("Qwen/Qwen3-0.6B", "v1") == random_checkpoint
    assert (asked["name"], asked["revision"]) == ("Qwen/Qwen3-0.6B", "v1")
    wanted = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    unwanted = ["modeling_qwen3.py", "pytorch_model.bin", "onnx/model.safetensors", "README.md", "model.gguf"]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(filter_repo_objects([*wanted, *unwanted], **patterns)) == wanted  # type: ignore[arg-type]


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """As huggingface_hub raises it; which HTTP client that is depends on its version."""
    client = import_module(errors.Response.__module__.partition(".")[0])
    response = client.Response(status, request=client.Request("GET", "https://huggingface.co/api/models/x"))
    return kind(f"{status} Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http(errors.GatedRepoError, 403), "gated: accept its terms at .*/Qwen/Qwen3-0.6B"),
        (http(errors.RepositoryNotFoundError, 401), "no folder 'Qwen/Qwen3-0.6B' here, and the hub has no such model"),
        (http(errors.RevisionNotFoundError, 404), "no revision 'v1'"),
        (http(errors.HfHubHTTPError, 500), "can't be downloaded: HfHubHTTPError: 500 Client Error"),
        (errors.LocalEntryNotFoundError("not here"), "the hub can't be reached"),
        (errors.OfflineModeIsEnabled("offline"), "pass a folder"),
        (OSError(28, "No space left on device"), "can't be downloaded: OSError: .*No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_a_typed_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=says) as caught:
        find_checkpoint("Qwen/Qwen3-0.6B", "v1")
    for name in (constants.ENDPOINT, "HF_ENDPOINT", constants.HF_HUB_CACHE, "HF_TOKEN", "hf auth login"):
        assert name in str(caught.value)


def snapshot(cache: Path) -> Path:
    return next((cache / "models--Qwen--Qwen3-0.6B" / "snapshots").iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cache_that_holds_a_part_speaks_of_the_download(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Another program fetched the tokenizer only, or the download broke off: the link is there and its file is not."""
    (snapshot(hub_cache) / name).unlink()
    (snapshot(hub_cache) / name).symlink_to(hub_cache / "blobs" / "none")
    with pytest.raises(HubError, match=rf"complete in the hub's cache; it lacks {name}, and HF_HUB_OFFLINE is set"):
        find_checkpoint("Qwen/Qwen3-0.6B")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot(hub_cache)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=rf"there is no {name}. Either the hub's repository lacks it"):
        find_checkpoint("Qwen/Qwen3-0.6B")


def test_shards_that_the_cache_lacks_are_named(hub_cache: Path) -> None:
    folder = snapshot(hub_cache)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00005.safetensors")
    where = {f"w{shard}": f"model-{shard:05}-of-00005.safetensors" for shard in range(1, 6)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    lacks = r"lacks model-00002-of-00005.safetensors, .*, model-00004-of-00005.safetensors and 1 more"
    with pytest.raises(HubError, match=lacks):
        find_checkpoint("Qwen/Qwen3-0.6B")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert find_checkpoint("Qwen/Qwen3-0.6B") == folder, "the loader says what is wrong with an index"


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def refuse(*_: object, **__: object) -> str:
        raise http(errors.GatedRepoError, 403)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match="Token: one is set") as caught:
        find_checkpoint("Qwen/Qwen3-0.6B")
    assert "hf_secret" not in str(caught.value)
