"""Reads, writes and verifies one KV entry as one immutable, self-describing safetensors file.

Knows nothing about the index or where files lie.

The tensors are `layer.000`, `layer.001`, ..., each [2 (K, V), pages, kv_heads, page_size, head_dim], and `token_ids`,
int32 [tokens]. The metadata are `key` (the key record), `chunk` (id, namespace, level, text; or null), `page_size`,
`tokens`, `provenance`, `created`, and `digest`. The digest is xxh3_128 over all other metadata, over every tensor's
name, dtype and shape, and over every tensor's bytes. safetensors itself has no checksum, so without the digest most
flipped bits would go unnoticed.
"""

import contextlib
import errno
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, TensorSpec, serialize_file

from braidsdk.errors import InputError
from braidsdk.store.keys import FORMAT_VERSION, EntryKey, canonical_json

HEADER_LIMIT_BYTES = 100_000_000  # what safetensors allows
TOKEN_IDS = "token_ids"

_CODES = {
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
_CODE_OF_DTYPE = {name: code for code, (name, _) in _CODES.items()}
ITEM_BYTES = dict(_CODES.values())
"""Bytes per element for each dtype that a slab may have, by torch name."""


class DamagedFile(Exception):  # noqa: N818 - internal, and it names a state of the file
    """A file does not hold what was written. The message tells people why."""


@dataclass(frozen=True)
class Slab:
    """The keys and values of one layer.

    Attributes:
        dtype: torch name, such as "bfloat16".
        shape: [2 (K, V), pages, kv_heads, page_size, head_dim].
        data: the elements, C-contiguous. If they were read from the store, this is a writable view of one buffer for
            the whole file.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data.nbytes


@dataclass(frozen=True)
class Place:
    """The caller's memory, into which an entry can be read directly, without a buffer in between.

    Attributes:
        dtype: torch name of the elements.
        shape: shape of each layer's slab.
        buffers: for each layer, writable and contiguous memory that its slab's bytes fill in order. Together the
            buffers are as long as the slab.
    """

    dtype: str
    shape: tuple[int, ...]
    buffers: Sequence[Sequence[memoryview]]


@dataclass(frozen=True)
class Header:
    """Everything in a file except the tensors' bytes. `key` is the key record, `chunk` the chunk record or None."""

    key: dict[str, Any]
    chunk: dict[str, Any] | None
    page_size: int
    tokens: int
    provenance: dict[str, Any]
    created: str
    digest: str
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]  # name -> code, shape, begin, end within the file

    @property
    def nbytes(self) -> int:
        """Bytes of KV: all tensors except the token ids."""
        return sum(end - begin for name, (_, _, begin, end) in self.tensors.items() if name != TOKEN_IDS)


@dataclass(frozen=True)
class Blob:
    """A verified file. `slabs` is None if they were read into the caller's memory."""

    header: Header
    slabs: tuple[Slab, ...] | None
    token_bytes: bytes


def write(
    path: Path,
    *,
    key: EntryKey,
    chunk: Mapping[str, Any] | None,
    slabs: Sequence[Slab],
    provenance: Mapping[str, Any],
    created: str,
    mode: int,
) -> str:
    """Write an entry durably to a new file, and return its digest. After an error nothing is left at `path`.

    Raises:
        InputError: the slabs are not those of the key's model, or the provenance is not JSON.
        OSError: the disk is full or fails.
    """
    check_slabs(key, slabs)
    metadata = {
        "format": str(FORMAT_VERSION),
        "key": key.record_json,
        "chunk": canonical_json(chunk),
        "page_size": str(slabs[0].shape[3]),
        "tokens": str(len(key.token_ids)),
        "provenance": _provenance_json(provenance),
        "created": created,
    }
    tensors = {f"layer.{i:03d}": (_CODE_OF_DTYPE[s.dtype], s.shape, s.data.cast("B")) for i, s in enumerate(slabs)}
    tensors[TOKEN_IDS] = ("I32", (len(key.token_ids),), memoryview(key.token_bytes))
    state = _described(metadata, {name: (code, shape) for name, (code, shape, _) in tensors.items()})
    for _, (_, _, view) in sorted(tensors.items()):
        state.update(view)
    metadata["digest"] = state.hexdigest()
    arrays = {name: np.frombuffer(view, dtype=np.uint8) for name, (_, _, view) in tensors.items()}  # keeps them alive
    specs = {
        name: TensorSpec(
            dtype=_CODES[code][0], shape=shape, data_ptr=arrays[name].ctypes.data, data_len=arrays[name].nbytes
        )
        for name, (code, shape, _) in tensors.items()
    }
    try:
        try:
            serialize_file(specs, path, metadata=metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fchmod(descriptor, mode)  # safetensors leaves 0600
            os.fsync(descriptor)  # safetensors leaves it to the page cache
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return metadata["digest"]


def check_slabs(key: EntryKey, slabs: Sequence[Slab]) -> None:
    """Refuse slabs that can't be an entry of this key.

    Raises:
        InputError: the number of layers, a shape, a dtype or a size is wrong.
    """
    model = key.model
    if len(slabs) != model.layers:
        raise InputError(
            f"slabs must hold {model.layers} slabs, one per layer; got {len(slabs)}. Pass every layer's slab."
        )
    for layer, slab in enumerate(slabs):
        if slab.dtype not in ITEM_BYTES:
            raise InputError(
                f"The dtype of layer {layer} must be one of {', '.join(sorted(ITEM_BYTES))}; got {slab.dtype!r}. "
                "Convert the tensor first."
            )
        if not slab.data.c_contiguous or slab.data.nbytes != math.prod(slab.shape) * ITEM_BYTES[slab.dtype]:
            raise InputError(
                f"The data of layer {layer} must be contiguous and fill {list(slab.shape)} {slab.dtype}; got "
                f"{slab.data.nbytes} bytes. Make the tensor contiguous first."
            )
        ok = len(slab.shape) == 5 and (slab.shape[0], slab.shape[2], slab.shape[4]) == (
            2,
            model.kv_heads,
            model.head_dim,
        )
        if not ok or slab.shape != slabs[0].shape or slab.shape[1] * slab.shape[3] < len(key.token_ids):
            raise InputError(
                f"The shape of layer {layer} must be [2, pages, {model.kv_heads}, page_size, {model.head_dim}] with "
                f"room for {len(key.token_ids)} tokens, the same in every layer; got {list(slab.shape)}."
            )


def read(path: Path, place: Place | None = None) -> Blob:
    """Read a file and verify every byte of it.

    Nothing is memory-mapped, because a mapped file that is truncated kills the process.

    Args:
        path: the file.
        place: where its slabs go if they have that dtype and shape. Otherwise, and with None, they go into one new
            buffer. The memory holds the entry only if this function returns.

    Raises:
        DamagedFile: it does not hold what was written.
        OSError: it is missing or can't be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = _read(file, min(8, size))
        header = _parse(memoryview(start + _read(file, _header_end(start, size) - 8)), size)
        layers = sorted(header.tensors.keys() - {TOKEN_IDS})
        buffers: dict[str, Sequence[memoryview]] = {TOKEN_IDS: [np.empty(4 * header.tokens, dtype=np.uint8).data]}
        placed = place is not None and _fits(header, layers, place)
        if place is not None and placed:
            buffers.update(zip(layers, place.buffers, strict=True))
        else:
            whole = np.empty(header.nbytes, dtype=np.uint8).data
            for name in layers:
                _, _, begin, end = header.tensors[name]
                buffers[name], whole = [whole[: end - begin]], whole[end - begin :]
        state = _described(header.metadata, {name: tensor[:2] for name, tensor in header.tensors.items()})
        for name, (_, _, begin, _) in sorted(header.tensors.items()):
            file.seek(begin)
            for buffer in buffers[name]:
                _fill(file, buffer)
                state.update(buffer)  # now, while it is in the processor's cache
    if state.hexdigest() != header.digest:
        raise DamagedFile("its content does not match its digest")
    token_bytes = bytes(buffers[TOKEN_IDS][0])
    if placed:
        return Blob(header, None, token_bytes)
    slabs = (Slab(_CODES[header.tensors[name][0]][0], header.tensors[name][1], buffers[name][0]) for name in layers)
    return Blob(header, tuple(slabs), token_bytes)


def _fits(header: Header, layers: Sequence[str], place: Place) -> bool:
    """Whether the slabs have the dtype and shape that the caller's memory was made for."""
    wanted = (_CODE_OF_DTYPE[place.dtype], place.shape)
    return len(layers) == len(place.buffers) and all(header.tensors[name][:2] == wanted for name in layers)


def _read(file: FileIO, count: int) -> bytes:
    buffer = bytearray(count)
    _fill(file, memoryview(buffer))
    return bytes(buffer)


def _fill(file: FileIO, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise DamagedFile(f"it ends {len(buffer) - filled} bytes early")
        filled += count


def read_header(path: Path) -> Header:
    """Read and check only a file's header. The tensors' bytes are not read, and the digest is not checked.

    Raises:
        DamagedFile: the header is damaged.
        OSError: the file is missing or can't be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        rest = file.read(_header_end(start, size) - 8)
    return _parse(memoryview(start + rest), size)


def is_of_another_format(path: Path) -> bool:
    """Whether a file has another format, so that another version of the store may be able to read it."""
    try:
        return read_header(path).metadata.get("format") != str(FORMAT_VERSION)
    except (DamagedFile, FileNotFoundError):
        return False


def read_token_bytes(path: Path, header: Header) -> bytes:
    """Read only a file's token ids, little-endian int32, without verifying them."""
    _, _, begin, end = header.tensors[TOKEN_IDS]
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _provenance_json(provenance: Mapping[str, Any]) -> str:
    try:
        return canonical_json(dict(provenance))
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance must hold plain JSON values; got another: {error}.") from None


def _described(metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> xxhash.xxh3_128:
    """The start of the digest: xxh3_128 over the length-prefixed description of the file. The tensors' bytes follow, in
    the order of their names."""
    shapes = [[name, code, list(shape)] for name, (code, shape) in sorted(tensors.items())]
    described = {name: text for name, text in metadata.items() if name != "digest"}
    head = canonical_json([described, shapes]).encode()
    return xxhash.xxh3_128(struct.pack("<Q", len(head)) + head)


def _header_end(start: bytes | memoryview, size: int) -> int:
    if len(start) < 8:
        raise DamagedFile(f"it must have at least 8 bytes; it has {len(start)}")
    length = int(struct.unpack("<Q", start)[0])
    if length > min(HEADER_LIMIT_BYTES, size - 8):
        raise DamagedFile(f"its header claims {length} bytes of a file of {size}")
    return 8 + length


def _parse(head: memoryview, size: int) -> Header:
    """Turn the first bytes of a file of `size` bytes into a header, without trusting any of them."""
    if len(head) < 8 or len(head) != _header_end(head[:8], size):
        raise DamagedFile("its header is cut short")
    try:
        parsed = json.loads(bytes(head[8:]))
        metadata = parsed.pop("__metadata__")
        tensors = {
            str(name): (str(t["dtype"]), tuple(t["shape"]), t["data_offsets"][0], t["data_offsets"][1])
            for name, t in parsed.items()
        }
        placed = _placed(tensors, len(head), size)
        header = Header(
            key=json.loads(metadata["key"]),
            chunk=json.loads(metadata["chunk"]),
            page_size=int(metadata["page_size"]),
            tokens=int(metadata["tokens"]),
            provenance=json.loads(metadata["provenance"]),
            created=metadata["created"],
            digest=metadata["digest"],
            metadata=metadata,
            tensors=placed,
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedFile(f"its header can't be read ({type(error).__name__})") from None
    if placed.get(TOKEN_IDS, ("", ()))[:2] != ("I32", (header.tokens,)):
        raise DamagedFile("its token ids are missing or misshapen")
    return header


def _placed(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], start: int, size: int
) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Check that the tensors fill the file without a gap, each aligned to its items. Returns their offsets in the
    file."""
    placed: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    end = 0
    for name, (code, shape, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2]):
        item = _CODES[code][1]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, stop)):
            raise DamagedFile(f"tensor {name[:20]!r} has a shape or an offset that is not a natural number")
        if begin != end or stop - begin != math.prod(shape) * item or (start + begin) % item:
            raise DamagedFile(f"tensor {name[:20]!r} is not where its neighbours and its shape say")
        placed[name] = (code, shape, start + begin, start + stop)
        end = stop
    if start + end != size:
        raise DamagedFile(f"it must have {start + end} bytes; it has {size}")
    return placed
