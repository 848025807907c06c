"""Downloads checkpoints from the Hugging Face hub into its cache, safetensors only. Its errors say what to do."""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from braidsdk.errors import HubError

_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "*.safetensors",
    "model.safetensors.index.json",
]


def fetch(model: str, revision: str | None = None) -> Path:
    """Download a checkpoint into the hub's cache, or find it there. Code in the repository is never fetched.

    Args:
        model: the hub id.
        revision: branch, tag or commit; None is the default branch.

    Raises:
        HubError: the hub can't be reached, does not have it or a part of it, or does not allow it.
    """
    what = model if revision is None else f"{model} at revision {revision!r}"
    try:
        folder = Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"])
        )
    except GatedRepoError as error:
        raise _error(f"{what} is gated: accept its terms at {constants.ENDPOINT}/{model}, and log in") from error
    except RepositoryNotFoundError as error:
        raise _error(
            f"There is no folder {model!r} here, and the hub has no such model, or it hides the model. Check the name"
        ) from error
    except RevisionNotFoundError as error:
        raise _error(f"The hub has {model}, but no revision {revision!r}. Pass a branch, a tag or a commit") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reached = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        raise _error(
            f"{what} is neither a folder here nor complete in the hub's cache, and {reached}. Download it once with a "
            "connection, name a mirror, or pass a folder"
        ) from error
    except Exception as error:  # many libraries raise here: HTTP, file locks, a full disk
        reason = next(iter(str(error).strip().splitlines()), "")
        raise _error(f"{what} can't be downloaded: {type(error).__name__}: {reason}") from error
    lacking = _lacking(folder)
    if lacking:
        lacks = f"{', '.join(lacking[:3])}{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}"
        if constants.HF_HUB_OFFLINE:
            raise _error(
                f"{what} must be complete in the hub's cache; it lacks {lacks}, and HF_HUB_OFFLINE is set. Download it "
                "once with a connection, or pass a folder"
            )
        raise _error(
            f"{what} must have config.json, tokenizer.json and safetensors weights; there is no {lacks}. Either the "
            "hub's repository lacks it, then choose another one; or the hub can't be reached and its cache holds only "
            "a part, then download it once with a connection"
        )
    return folder


def _lacking(folder: Path) -> list[str]:
    """The files that a checkpoint can't do without and that a snapshot lacks. The hub's client takes a folder of the
    cache for complete when it can't ask the hub, although another program may have fetched only the tokenizer."""
    index = folder / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if index.is_file():
        try:
            weights = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            weights = []  # whoever reads the weights says what is wrong with their index
    return [name for name in ("config.json", "tokenizer.json", *weights) if not (folder / name).is_file()]


def _error(why: str) -> HubError:
    token = "none is set" if huggingface_hub.get_token() is None else "one is set"
    return HubError(
        f"{why}. Hub: {constants.ENDPOINT} (HF_ENDPOINT). Cache: {constants.HF_HUB_CACHE} (HF_HUB_CACHE). "
        f"Token: {token} (HF_TOKEN, or `hf auth login`)."
    )
