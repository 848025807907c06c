"""Downloads checkpoints from the Hugging Face hub into its cache, safetensors only. Its errors say what to do."""

import re
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


def is_hub_id(model: str) -> bool:
    """Whether a name has the form of a hub id, `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None


def fetch(model: str, revision: str | None = None) -> Path:
    """Download a checkpoint into the hub's cache, or find it there. Code in the repository is never fetched.

    Args:
        model: the hub id.
        revision: branch, tag or commit; None is the default branch.

    Raises:
        HubError: the hub can't be reached, does not have it, or does not allow it.
    """
    what = model if revision is None else f"{model} at revision {revision!r}"
    try:
        return Path(
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


def _error(why: str) -> HubError:
    token = "none is set" if huggingface_hub.get_token() is None else "one is set"
    return HubError(
        f"{why}. Hub: {constants.ENDPOINT} (HF_ENDPOINT). Cache: {constants.HF_HUB_CACHE} (HF_HUB_CACHE). "
        f"Token: {token} (HF_TOKEN, or `hf auth login`)."
    )
