"""Reading a checkpoint's safetensors files, strictly: every tensor is asked for once, by name and shape."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from braidsdk.errors import ModelNotFoundError, WeightsError


class Weights:
    """The tensors of one checkpoint. `take` gives them out; `finish` says that nothing was left over."""

    def __init__(self, folder: Path) -> None:
        """Open `model.safetensors`, or the shards that `model.safetensors.index.json` names.

        Raises:
            ModelNotFoundError: the folder holds neither.
            WeightsError: a file can't be read, or a shard is missing.
        """
        self._folder = folder
        self._files = {}
        index = folder / "model.safetensors.index.json"
        if (single := folder / "model.safetensors").is_file():
            paths = [single]
        elif index.is_file():
            paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            raise ModelNotFoundError(
                f"{folder} holds no model.safetensors. Save the model there with save_pretrained(folder); "
                "other formats are not read."
            )
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{path} can't be read: {error}. Copy the checkpoint again.") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        self._digests: dict[str, str] = {}

    def take(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The named tensors, stacked along their first dimension in the order given.

        Raises:
            WeightsError: one is missing, or has another shape.
        """
        parts = []
        for name, shape in shapes.items():
            if name not in self._files:
                raise WeightsError(
                    f"{self._folder} has no weight {name!r} of shape {list(shape)}. "
                    "The checkpoint is incomplete, or config.json belongs to another model."
                )
            stored = self._files[name].get_tensor(name)
            if tuple(stored.shape) != shape:
                raise WeightsError(
                    f"Weight {name!r} in {self._folder} has shape {list(stored.shape)}; config.json asks for "
                    f"{list(shape)}. Use the config.json that belongs to these weights."
                )
            digest = xxhash.xxh3_128(f"{name} {stored.dtype} {list(shape)}".encode())
            digest.update(stored.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._digests[name] = digest.hexdigest()
            parts.append(stored.to(dtype))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(device)

    def finish(self, ignored: frozenset[str] = frozenset()) -> str:
        """The fingerprint of all that was taken.

        Args:
            ignored: names that may be left over.

        Raises:
            WeightsError: the checkpoint holds weights that nothing asked for.
        """
        left = sorted(self._files.keys() - self._digests.keys() - ignored)
        if left:
            raise WeightsError(
                f"{self._folder} holds {len(left)} weights that this architecture does not use, such as {left[0]!r}. "
                "Check that config.json belongs to them."
            )
        return xxhash.xxh3_128_hexdigest(json.dumps(sorted(self._digests.items())).encode())
