"""Names to checkpoints, and checkpoints to the family that computes them."""

from pathlib import Path

import torch

from braidsdk.errors import InputError, ModelNotFoundError, UnsupportedModelError, did_you_mean, shown
from braidsdk.models.base import Model, read_json
from braidsdk.models.hub import fetch, is_hub_id
from braidsdk.models.qwen3 import Qwen3

EMBEDDED = {"braid-tiny": Path(__file__).parent / "tiny" / "checkpoint"}
"""Checkpoints that ship with the package."""

FAMILIES: dict[str, type[Model]] = {"qwen3": Qwen3}
"""`model_type` in config.json to the class that computes it."""


def find_checkpoint(model: str | Path, revision: str | None = None) -> Path:
    """The folder of an embedded checkpoint, of one on disk, or of one from the hub, downloaded if need be.

    Args:
        model: an embedded name, a folder, or (no such folder, and one slash) a hub id. A `Path` is always a folder.
        revision: of a hub checkpoint: branch, tag or commit.

    Raises:
        InputError: no name and no folder; a revision of something that does not come from the hub.
        ModelNotFoundError: there is no checkpoint there; HubError: the hub did not give it.
    """
    if not isinstance(model, str | Path) or "\0" in str(model) or len(str(model)) > 4000:
        raise InputError(f"model must be a name or a folder; got {shown(model)}.")
    folder = (EMBEDDED.get(model) if isinstance(model, str) else None) or Path(model).expanduser()
    if isinstance(model, str) and is_hub_id(model) and not folder.exists():
        return fetch(model, revision)
    if revision is not None:
        raise InputError(f"revision is for checkpoints from the hub; {str(model)!r} is a folder. Leave it out.")
    if not _is_file(folder / "config.json"):
        raise ModelNotFoundError(
            f"No checkpoint at {str(folder)!r}: expected a folder with config.json, model.safetensors and "
            f"tokenizer.json, a hub id such as 'Qwen/Qwen3-0.6B', or one of {', '.join(EMBEDDED)}."
            f"{did_you_mean(model, EMBEDDED)}"
        )
    return folder


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def load_model(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None, fingerprints: Path | None = None
) -> Model:
    """Load a checkpoint with the family that its config names; arguments and errors as in `models.base.Model.load`."""
    path = folder / "config.json"
    model_type = read_json(path).get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{path} is of a {model_type!r} model; BraidSDK computes {', '.join(sorted(FAMILIES))}. Choose a "
            "checkpoint of these."
        )
    return FAMILIES[model_type].load(folder, device=device, dtype=dtype, fingerprints=fingerprints)
