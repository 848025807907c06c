"""Reads a checkpoint's safetensors files, strictly and in bounded memory.

All names and shapes are checked before a weight is read. A weight that is computed in the dtype that it is stored in
may be mapped: it stays in the file, and processes that map the same file share its memory. Other weights are read into
tensors in pieces.

A mapped file must keep its content while a process has it open. A file that is overwritten in place changes the model,
and one that is truncated ends the process with SIGBUS. Neither can be caught. So replace a checkpoint's file by
renaming a new one over it: the old file stays there until nobody maps it.
"""

import itertools
import json
import math
import mmap
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from braidsdk.errors import ModelNotFoundError, WeightsError
from braidsdk.kernels.memory import empty
from braidsdk.kernels.weight import Rows
from braidsdk.models.fingerprints import recall, remember, stamp

PIECE_BYTES = 4 << 20
"""This many bytes are read, checked and converted at a time. They stay in a CPU's cache."""

ABSURD = 1e6
"""Larger magnitudes are reported. Trained weights stay orders of magnitude below, and uninitialised memory does not."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMED = 8  # an error names this many weights, and only counts the others


class WeightsWarning(UserWarning):
    """A checkpoint holds weights that are not used, or finite weights of absurd size."""


@dataclass(frozen=True)
class Stored:
    """Where a weight lies."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.code]


class Weights:
    """The tensors of one checkpoint: `expect` checks names and shapes, `take` reads, `finish` gives the fingerprint.

    Attributes:
        path: the checkpoint.
    """

    def __init__(self, folder: Path, fingerprints: Path | None = None) -> None:
        """Open `model.safetensors`, or the shards that `model.safetensors.index.json` names.

        Args:
            folder: the checkpoint.
            fingerprints: a file that remembers the fingerprints of checkpoints that were read before. None hashes all
                weights again.

        Raises:
            ModelNotFoundError: the folder holds neither.
            WeightsError: a file can't be read, a shard is missing, or two shards hold a weight of one name.
        """
        self.path = folder
        self._remembered = fingerprints
        paths = _weight_files(folder)
        self._files = [*paths, folder / "config.json"]  # the config decides which weights are taken
        self._stored: dict[str, Stored] = {}
        self._stamp = stamp([file for file in self._files if file.exists()])
        for path in paths:
            for name, stored in _header(path).items():
                if other := self._stored.get(name):
                    raise WeightsError(
                        f"{name!r} must be in one file of {folder}; {other.path.name} and {path.name} both hold it. "
                        "Keep the shards of one save."
                    )
                self._stored[name] = stored
        if "embed_tokens.weight" in self._stored:  # saved without the head, as a base model
            self._stored = {_of_a_head(name): stored for name, stored in self._stored.items()}
        for name in [name for name in self._stored if name.endswith(".rotary_emb.inv_freq")]:
            del self._stored[
                name
            ]  # old versions of transformers saved this buffer; new ones compute it from the config
        self._known = recall(fingerprints, self._stamp) if fingerprints else None
        # One buffer for all reads leaves no holes in the heap.
        self._buffer = torch.frombuffer(bytearray(PIECE_BYTES), dtype=torch.uint8)
        self._maps: dict[Path, mmap.mmap] = {}
        self._digests: dict[str, str] = {}
        self._not_finite: list[str] = []
        self._absurd: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype that a weight is stored in. None if it is not there, or has a dtype that is not read."""
        stored = self._stored.get(name)
        return _DTYPES.get(stored.code) if stored else None

    def _reads(self, code: str) -> bool:
        """Whether weights that are stored so can be read."""
        return code in _DTYPES

    def expect(self, shapes: Mapping[str, tuple[int, ...]], unused: Collection[str] = ()) -> None:
        """Check every name, shape and dtype against what the config asks for. Reads no weight.

        Args:
            shapes: the weights that will be taken.
            unused: weights that may be there and are not used. They are reported, and are not an error.

        Raises:
            WeightsError: weights are missing, misshapen, quantised, or nothing asks for them.
        """
        faults = []
        if missing := [f"{name!r} of shape {list(shape)}" for name, shape in shapes.items() if name not in self]:
            faults.append(f"lacks {_listed(missing)}")
        there = {name: self._stored[name] for name in shapes if name in self}
        faults += _first(
            f"has {name!r}, which has shape {list(stored.shape)}; config.json asks for {list(shapes[name])}"
            for name, stored in there.items()
            if stored.shape != shapes[name]
        )
        faults += _first(
            f"stores {name!r} as {stored.code}, but weights must be {', '.join(_DTYPES)} and not quantised"
            for name, stored in there.items()
            if not self._reads(stored.code)
        )
        if left := [repr(name) for name in sorted(self._stored.keys() - shapes.keys() - set(unused))]:
            faults.append(f"holds {len(left)} weights that this architecture does not use, such as {_listed(left)}")
        if faults:
            raise WeightsError(
                f"{self.path} " + "; it ".join(faults) + ". Use the config.json that belongs to these weights, or "
                "copy the checkpoint again."
            )
        if spare := [repr(name) for name in sorted(self._stored.keys() & set(unused))]:
            self._warn(f"{self.path} holds weights that its config.json switches off; they are not used", spare)

    @overload
    def take(
        self, names: Sequence[str], dtype: torch.dtype, device: torch.device, *, mapped: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def take(
        self, names: Sequence[str], dtype: torch.dtype, device: torch.device, *, mapped: bool
    ) -> Tensor | Rows: ...

    def take(
        self, names: Sequence[str], dtype: torch.dtype, device: torch.device, *, mapped: bool = False
    ) -> Tensor | Rows:
        """Read the named tensors, and stack them along their first dimension in this order. Call `expect` first.

        Args:
            names: the weights.
            dtype, device: what is wanted.
            mapped: leave them in their files if they lie there as they are wanted. Several of them are `Rows` then.
                Write to none of them.

        Raises:
            WeightsError: a file can't be read or ends early.
        """
        if mapped and all(self._is_mappable(name, dtype, device) for name in names):
            views = tuple(map(self._view, names))
            return views[0] if len(views) == 1 else Rows(views)
        parts = [self._stored[name] for name in names]
        packed = empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype, device)
        for name, rows in zip(names, packed.split([part.shape[0] for part in parts]), strict=True):
            self._read(name, rows.view(-1))
        return packed

    def drop_copy(self, copy: str, of: str) -> bool:
        """Forget a stored weight if it has the dtype, shape and bytes of another. Returns whether it has."""
        one, other = self._stored[copy], self._stored[of]
        same = (one.code, one.shape) == (other.code, other.shape)
        same = same and all(a == b for a, b in itertools.zip_longest(_pieces(one), _pieces(other)))
        if same:
            del self._stored[copy]
        return same

    def finish(self) -> str:
        """The fingerprint of everything that was taken: of names, stored dtypes, shapes and bytes. How they are spread
        over files does not matter.

        Raises:
            WeightsError: weights that were taken are not finite.
        """
        if self._not_finite:
            raise WeightsError(
                f"Weights must be finite; {self.path} holds NaN or infinity in {_listed(self._not_finite)}. Copy "
                "the checkpoint again. If its source has them too, it can't be used."
            )
        if self._absurd:
            self._warn(f"{self.path} holds weights above {ABSURD:g}, as if they were never initialised", self._absurd)
        if self._known:
            return str(self._known)
        fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(sorted(self._digests.items())).encode())
        if self._remembered and not self._absurd:
            remember(self._remembered, self._stamp, self._files, fingerprint)
        return fingerprint

    def _is_mappable(self, name: str, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a weight lies in its file as it is wanted."""
        stored = self._stored[name]
        return device.type == "cpu" and _DTYPES.get(stored.code) == dtype and stored.start % dtype.itemsize == 0

    def _view(self, name: str) -> Tensor:
        """A stored weight in its mapped file."""
        stored = self._stored[name]
        try:
            file = self._map(stored.path)
            if stored.start + stored.nbytes > file.size():  # its size now
                raise _cut_short(stored.path, name)
        except (OSError, ValueError) as error:  # ValueError: nothing is left of it
            raise _unreadable(stored.path, error) from error
        values = torch.frombuffer(file, dtype=stored.dtype, count=math.prod(stored.shape), offset=stored.start)
        if not self._known:
            self._inspect(name, values)
        return values.view(stored.shape)

    def _inspect(self, name: str, values: Tensor) -> None:
        """Hash and check a weight where it lies, flat."""
        seen = _Seen(name, self._stored[name])
        for piece in values.split(PIECE_BYTES // values.itemsize):
            seen.add(piece)
        self._note(name, seen, values.dtype)

    def _map(self, path: Path) -> mmap.mmap:
        """A file in memory. What is written there would be a copy and leave the file as it is."""
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if hasattr(mmap, "MADV_WILLNEED"):
                memory.madvise(mmap.MADV_WILLNEED)  # the system reads ahead
        return self._maps[path]

    def _read(self, name: str, target: Tensor) -> None:
        """Fill `target`, which is flat, with a stored weight. Hash and check it unless the same files were read
        before."""
        stored = self._stored[name]
        direct = target.device.type == "cpu" and target.dtype == stored.dtype
        step = PIECE_BYTES // stored.dtype.itemsize
        buffer = self._buffer.view(stored.dtype)
        seen = None if self._known else _Seen(name, stored)
        try:
            with stored.path.open("rb") as file:
                file.seek(stored.start)
                for piece in target.split(step):
                    values = piece if direct else buffer[: piece.numel()]
                    data = values.view(torch.uint8).numpy().data
                    if file.readinto(data) != data.nbytes:
                        raise _cut_short(stored.path, name)
                    if seen:
                        seen.add(values)
                    if not direct:
                        piece.copy_(values)
        except OSError as error:
            raise _unreadable(stored.path, error) from error
        if seen:
            self._note(name, seen, target.dtype)

    def _note(self, name: str, seen: "_Seen", dtype: torch.dtype) -> None:
        self._digests[name] = seen.digest.hexdigest()
        self._judge(name, float(seen.largest), dtype)

    def _judge(self, name: str, largest: float, dtype: torch.dtype) -> None:
        """Note a weight whose largest magnitude is not finite in this dtype, or absurd."""
        if not largest <= torch.finfo(dtype).max:
            self._not_finite.append(repr(name))
        elif largest > ABSURD:
            self._absurd.append(repr(name))

    def _warn(self, what: str, names: Sequence[str]) -> None:
        warnings.warn(f"{what}: {_listed(names)}.", WeightsWarning, stacklevel=6)


class _Seen:
    """What is found out about a weight while it passes in pieces.

    Attributes:
        digest: of its name, dtype, shape and bytes.
        largest: its largest magnitude, NaN if it holds one.
    """

    def __init__(self, name: str, stored: Stored) -> None:
        self.digest = xxhash.xxh3_128(f"{name} {stored.dtype} {list(stored.shape)}".encode())
        self.largest = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        self.digest.update(values.view(torch.uint8).numpy().data)
        low, high = torch.aminmax(values)
        self.largest = torch.maximum(self.largest, torch.maximum(-low, high).double())  # NaN stays NaN


def _cut_short(path: Path, name: str) -> WeightsError:
    return WeightsError(f"{path} is cut short within {name!r}. Copy the checkpoint again.")


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} can't be read: {error}. Copy the checkpoint again.")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if not index.is_file():
        raise ModelNotFoundError(
            f"{folder} holds no model.safetensors. Save the model there with save_pretrained(folder). Other formats "
            "are not read."
        )
    try:
        names: set[str] = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} must name the shards; got {error!r}. Copy the checkpoint again.") from error


def _header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a file lies. The safetensors library has checked that the tensors fill the file exactly."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error
    header.pop("__metadata__", None)
    found = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        found[name] = Stored(path, info["dtype"], tuple(info["shape"]), 8 + size + begin, end - begin)
    return found


def _pieces(stored: Stored) -> Iterator[bytes]:
    left = stored.nbytes
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        while left > 0 and (piece := file.read(min(left, PIECE_BYTES))):
            yield piece
            left -= len(piece)


def _of_a_head(name: str) -> str:
    """The name of a base model's weight in a model with a language head."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _first(faults: Iterator[str]) -> list[str]:
    return list(itertools.islice(faults, _NAMED))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
