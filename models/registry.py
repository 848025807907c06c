"""Finds the checkpoint of a name, and the family that computes a checkpoint."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from braidsdk.errors import InputError, ModelNotFoundError, UnsupportedModelError, did_you_mean, shown
from braidsdk.kernels.backends import Backends, Geometry
from braidsdk.models.base import Model, read_json
from braidsdk.models.config import Family, read_config
from braidsdk.models.decoder import Decoder
from braidsdk.models.families.llama import LLAMA, MISTRAL
from braidsdk.models.families.qwen2 import QWEN2
from braidsdk.models.families.qwen3 import QWEN3
from braidsdk.models.gguf import SUFFIX, GGUFFile, GGUFWeights
from braidsdk.models.weights import Weights

EMBEDDED = {"braid-tiny": Path(__file__).parent / "tiny" / "checkpoint"}
"""Checkpoints that ship with the package."""

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
"""The families that are computed, by the `model_type` of config.json."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A name of the form `owner/name`."""


def find_checkpoint(model: str | Path, revision: str | None = None) -> Path:
    """The folder of an embedded checkpoint, of one on disk, or of one from the hub, which is downloaded if needed; or
    a GGUF file.

    Args:
        model: an embedded name, a folder, a GGUF file, or a hub id. A name with one slash is a hub id if there is no
            such folder or file. A `Path` is never a hub id.
        revision: the branch, tag or commit of a hub checkpoint.

    Raises:
        InputError: `model` is neither a name nor a folder, or a revision is given for a folder.
        ModelNotFoundError: there is no checkpoint. HubError: the hub did not give it.
    """
    if not isinstance(model, str | Path) or "\0" in str(model) or len(str(model)) > 4000:
        raise InputError(f"model must be a name or a folder; got {shown(model)}.")
    folder = (EMBEDDED.get(model) if isinstance(model, str) else None) or Path(model).expanduser()
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and not folder.exists():
        from braidsdk.models.hub import fetch

        return fetch(model, revision)
    if revision is not None:
        raise InputError(
            f"revision must be None unless the model comes from the hub; got one for the folder {str(model)!r}. Leave "
            "it out."
        )
    if folder.suffix == SUFFIX and _is_file(folder):
        return folder
    if not _is_file(folder / "config.json"):
        raise ModelNotFoundError(
            f"No checkpoint at {str(folder)!r}. model must be a folder with config.json, model.safetensors and "
            f"tokenizer.json, a GGUF file, a hub id such as 'Qwen/Qwen3-0.6B', or one of {', '.join(EMBEDDED)}."
            f"{did_you_mean(model, EMBEDDED)}"
        )
    return folder


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no file can have this name
        return False


def on_torch(_geometry: Geometry, _device: torch.device) -> Backends:
    """torch for every operation."""
    return Backends()


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    int8: bool = False,
    choose: Callable[[Geometry, torch.device], Backends] = on_torch,
    fingerprints: Path | None = None,
) -> Model:
    """Load a checkpoint of the family that its config names.

    Args:
        path: its folder, or a GGUF file.
        device, dtype, int8, choose: as in `Decoder.load`.
        fingerprints: a file that remembers the configurations and fingerprints of checkpoints that were read before.
            None hashes all weights again.

    Raises:
        UnsupportedModelError: the config asks for something that is not computed.
        WeightsError: weights are missing, unexpected, misshapen or not finite.
    """
    if path.suffix == SUFFIX:
        file = GGUFFile(path)
        config = file.config(_family(f"general.architecture in {path}", file.architecture))
        weights: Weights = GGUFWeights(file, config, fingerprints)
    else:
        named = path / "config.json"
        config = read_config(path, _family(f"model_type in {named}", read_json(named).get("model_type")), fingerprints)
        weights = Weights(path, fingerprints)
    return Decoder.load(config, weights, device=device, dtype=dtype, int8=int8, choose=choose)


def _family(what: str, name: object) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModelError(
            f"{what} must be one of {', '.join(sorted(FAMILIES))}; got {name!r}. Choose a checkpoint of such a family."
        )
    return FAMILIES[name]
