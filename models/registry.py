"""Names to checkpoints, and checkpoints to the family that computes them."""

import json
from pathlib import Path

import torch

from braidsdk.errors import ModelNotFoundError, UnsupportedModelError
from braidsdk.models.base import Model
from braidsdk.models.qwen3 import Qwen3

EMBEDDED = {"braid-tiny": Path(__file__).parent / "tiny" / "checkpoint"}
"""Checkpoints that ship with the package."""

FAMILIES: dict[str, type[Model]] = {"qwen3": Qwen3}
"""`model_type` in config.json to the class that computes it."""


def find_checkpoint(model: str | Path) -> Path:
    """The folder of an embedded checkpoint, or of one on disk.

    Raises:
        ModelNotFoundError: there is no config.json there.
    """
    folder = EMBEDDED.get(str(model)) or Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"No checkpoint at {str(folder)!r}: expected a folder with config.json, model.safetensors and "
            f"tokenizer.json, or one of {', '.join(EMBEDDED)}. This version does not download: fetch a hub checkpoint "
            "first (huggingface-cli download NAME --local-dir FOLDER) and pass the folder."
        )
    return folder


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> Model:
    """Load a checkpoint with the family that its config names.

    Raises:
        UnsupportedModelError: no family computes it, or not with this config.
        WeightsError: weights are missing, unexpected or misshapen.
    """
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{folder} holds a {model_type!r} model; BraidSDK computes {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type].load(folder, device=device, dtype=dtype)
