"""Reads, writes and verifies one KV entry as one immutable, self-describing safetensors file.

Knows nothing about the index or where files lie, and nothing about what the tensors mean: names, dtypes and shapes are
those of the codec that the key names.

The tensors are the codec's, and `token_ids`, int32 [tokens], in the order of `ordered`. The metadata are `digest`,
`payload`, `format`, `key` (the key record), `chunk` (id, namespace, level, text; or null), `provenance`, `created` and
`tokens`.
safetensors has no checksum, so without these two most flipped bits would go unnoticed: `payload` is xxh3_128 over all
tensors' bytes in the order of the file, and `digest` is xxh3_128 over the file's bytes up to the first tensor, with
zeros in its own place. That place is always the same, so a header is verified before it is parsed, and only what was
written here is parsed.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

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
"""Bytes per element for each dtype that a tensor may have, by torch name."""

_START = b'{"__metadata__":{"digest":"'
_DIGEST = slice(8 + len(_START), 8 + len(_START) + 32)
"""Where the digest stands in every file."""

_PIECES = 1024
"""The most pieces of memory that Linux reads or writes in one call."""

_BATCH_BYTES = 2**20
"""Bytes that are hashed right after they are read, or before they are written."""

_RECORD = {
    "format": int,
    "algorithm": int,
    "model": dict,
    "namespace": str,
    "chunk_id": (str, type(None)),
    "level": int,
    "after": list,
    "after_sha256": str,
}
_MODEL = {
    "weights": str,
    "tokenizer": str,
    "dtype": str,
    "codec": str,
    "layers": int,
    "kv_heads": int,
    "head_dim": int,
    "rope": str,
}
_METADATA = dict.fromkeys(("digest", "payload", "format", "key", "chunk", "provenance", "created", "tokens"), str)
_CHUNK = {"id": str, "namespace": str, "level": int, "text": str}


class DamagedFile(Exception):  # noqa: N818 - internal, and it names a state of the file
    """A file does not hold what was written. The message tells people why."""


@dataclass(frozen=True)
class Array:
    """A tensor's dtype, shape and bytes.

    Attributes:
        dtype: torch name, such as "bfloat16".
        shape: its dimensions.
        buffers: contiguous memory that holds its elements in C order, one piece after the other. It is writable if the
            tensor is to be read into it.
    """

    dtype: str
    shape: tuple[int, ...]
    buffers: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Tensors = Mapping[str, Array]
"""The tensors of an entry by their names, without the token ids."""


@dataclass(frozen=True)
class Header:
    """Everything in a file except the tensors' bytes.

    Attributes:
        key: the key record.
        chunk: the chunk record, or None.
        provenance: what computed it.
        created: when, ISO 8601.
        digest: xxh3_128 over the header, in hex. It covers the digest of the tensors too.
        payload: xxh3_128 over the tensors, in hex.
        tensors: dtype, shape and first byte within the file of each tensor, in the order of the file.
    """

    key: dict[str, Any]
    chunk: dict[str, Any] | None
    provenance: dict[str, Any]
    created: str
    digest: str
    payload: str
    tensors: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def begin(self) -> int:
        """The first byte behind the header."""
        return min(at for _, _, at in self.tensors.values())

    @property
    def end(self) -> int:
        """The size of the file in bytes."""
        return max(at + math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape, at in self.tensors.values())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.tensors[TOKEN_IDS][1][0]

    @property
    def nbytes(self) -> int:
        """Bytes of KV: all tensors except the token ids."""
        return sum(
            math.prod(shape) * ITEM_BYTES[dtype]
            for name, (dtype, shape, _) in self.tensors.items()
            if name != TOKEN_IDS
        )


@dataclass(frozen=True)
class Blob:
    """A verified file."""

    header: Header
    tensors: Tensors
    token_bytes: bytes


def write(
    path: Path,
    *,
    key: EntryKey,
    chunk: Mapping[str, Any] | None,
    tensors: Tensors,
    provenance: Mapping[str, Any],
    created: str,
    mode: int,
) -> str:
    """Write an entry durably to a new file, and return its digest. After an error nothing is left at `path`.

    Raises:
        InputError: a tensor has an unknown dtype or not the bytes of its shape, or the provenance is not flat JSON.
        OSError: the disk is full or fails.
    """
    _check(tensors)
    everything = {**tensors, TOKEN_IDS: Array("int32", (len(key.token_ids),), [memoryview(key.token_bytes)])}
    names = ordered(everything)
    metadata = {
        "digest": "0" * 32,
        "payload": "0" * 32,
        "format": str(FORMAT_VERSION),
        "key": key.record_json,
        "chunk": canonical_json(chunk),
        "provenance": _provenance_json(provenance),
        "created": created,
        "tokens": str(len(key.token_ids)),
    }
    begin = len(_header(metadata, everything, names))
    state = xxhash.xxh3_128()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.fchmod(descriptor, mode)
            at = begin
            for batch in _batches(everything[name].buffers for name in names):
                for buffer in batch:
                    state.update(buffer)
                at = _write_all(descriptor, batch, at)
            header = bytearray(_header({**metadata, "payload": state.hexdigest()}, everything, names))
            header[_DIGEST] = _digest_of(header)
            _write_all(descriptor, [memoryview(header)], 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return header[_DIGEST].decode()


def read(path: Path, place: Tensors | None = None, *, digest: str | None = None) -> Blob:
    """Read a file and verify every byte of it.

    Nothing is memory-mapped, because a mapped file that is truncated kills the process.

    Args:
        path: the file.
        place: the tensors that it must have, with the memory to read them into. None takes new memory for what it has.
            The memory holds the entry only if this function returns.
        digest: the digest that its header must have. Another header is not parsed, however sound it is. None takes any.

    Raises:
        DamagedFile: it does not hold what was written, or is no file.
        OSError: it is missing or can't be read.
    """
    with opened(path) as (descriptor, size):
        header = _read_header(descriptor, size, digest)
        if place is None:
            place = {
                name: Array(dtype, shape, [np.empty(math.prod(shape) * ITEM_BYTES[dtype], dtype=np.uint8).data])
                for name, (dtype, shape, _) in header.tensors.items()
                if name != TOKEN_IDS
            }
        there = {name: (dtype, shape) for name, (dtype, shape, _) in header.tensors.items() if name != TOKEN_IDS}
        if there != {name: (array.dtype, array.shape) for name, array in place.items()}:
            raise DamagedFile("it holds other tensors than its codec writes")
        token_bytes = bytearray(4 * header.tokens)
        everything = {name: array.buffers for name, array in place.items()} | {TOKEN_IDS: [memoryview(token_bytes)]}
        state, at = xxhash.xxh3_128(), header.begin
        for batch in _batches(everything[name] for name in header.tensors):
            at = _read_all(descriptor, batch, at)
            for buffer in batch:
                state.update(buffer)  # now, while it is in the processor's cache
    if state.hexdigest() != header.payload:
        raise DamagedFile("its content does not match its digest")
    return Blob(header, place, bytes(token_bytes))


def read_header(path: Path) -> Header:
    """Read and verify only a file's header. The tensors' bytes are not read.

    Raises:
        DamagedFile: the header is damaged, or there is no file but something else.
        OSError: the file is missing or can't be read.
    """
    with opened(path) as (descriptor, size):
        return _read_header(descriptor, size)


def read_token_bytes(path: Path, header: Header) -> bytes:
    """Read only a file's token ids, little-endian int32, without verifying them."""
    token_bytes = bytearray(4 * header.tokens)
    with opened(path) as (descriptor, _):
        _read_all(descriptor, [memoryview(token_bytes)], header.tensors[TOKEN_IDS][2])
    return bytes(token_bytes)


def is_of_another_format(path: Path) -> bool:
    """Whether a file is sound by the rules of safetensors and names another format than this version's, so that
    another version of the store may be able to read it."""
    try:
        with opened(path) as (descriptor, size):
            parsed = json.loads(_read_start(descriptor, size)[8:])
        named = parsed["__metadata__"]["format"]
    except (DamagedFile, FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return False
    except OSError:
        return True  # it can't be read, so it stays where it is
    return isinstance(named, str) and named != str(FORMAT_VERSION)


def is_key_record(value: object) -> bool:
    """Whether a value has the members of a key record, of the right types."""
    try:
        _check_record(value)
    except (ValueError, TypeError):
        return False
    return True


def ordered(tensors: Tensors) -> list[str]:
    """The names of tensors in the order of the file: those of large items first, so that each is aligned, then by
    name."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """The descriptor of a regular file, and the file's size. A pipe or a link in its place is neither waited for nor
    followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise DamagedFile("it is a link") from error
        if path.is_socket():
            raise DamagedFile("it is no regular file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile("it is no regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _batches(tensors: Iterable[Sequence[memoryview]]) -> Iterator[list[memoryview]]:
    """The bytes of tensors in order, as many at a time as stay in a processor's cache between two uses."""
    batch: list[memoryview] = []
    held = 0
    for buffer in (buffer.cast("B") for buffers in tensors for buffer in buffers):
        for start in range(0, len(buffer), _BATCH_BYTES):
            piece = buffer[start : start + _BATCH_BYTES]
            if len(batch) == _PIECES or (batch and held + len(piece) > _BATCH_BYTES):
                yield batch
                batch, held = [], 0
            batch.append(piece)
            held += len(piece)
    if batch:
        yield batch


def _write_all(descriptor: int, batch: Sequence[memoryview], at: int) -> int:
    """Write a batch from a place on, and return where it ends."""
    left = list(batch)
    while left:
        at = _advance(left, os.pwritev(descriptor, left, at), at)
    return at


def _read_all(descriptor: int, batch: Sequence[memoryview], at: int) -> int:
    """Fill a batch from a place on, and return where it ends."""
    left = list(batch)
    while left:
        count = os.preadv(descriptor, left, at)
        if not count:
            raise DamagedFile(f"it ends {sum(map(len, left))} bytes early")
        at = _advance(left, count, at)
    return at


def _advance(left: list[memoryview], count: int, at: int) -> int:
    """Take the first `count` bytes from what is left."""
    done, taken = 0, 0
    while taken < len(left) and done + len(left[taken]) <= count:
        done += len(left[taken])
        taken += 1
    del left[:taken]
    if count > done:
        left[0] = left[0][count - done :]
    return at + count


def _check(tensors: Tensors) -> None:
    for name, array in tensors.items():
        if name == TOKEN_IDS:
            raise InputError(f"A codec's tensors must not be called {TOKEN_IDS!r}; got one. Choose another name.")
        if array.dtype not in ITEM_BYTES:
            raise InputError(
                f"The dtype of {name} must be one of {', '.join(sorted(ITEM_BYTES))}; got {array.dtype!r}. Convert "
                "the tensor first."
            )
        held = sum(buffer.nbytes for buffer in array.buffers)
        if held != array.nbytes or not all(buffer.c_contiguous for buffer in array.buffers):
            raise InputError(
                f"The buffers of {name} must be contiguous and fill {list(array.shape)} {array.dtype}; got {held} "
                "bytes. Make the tensor contiguous first."
            )


def _provenance_json(provenance: Mapping[str, Any]) -> str:
    if not _is_flat(dict(provenance)):
        raise InputError("provenance must map names to text, finite numbers, bools or None; got something else.")
    return canonical_json(dict(provenance))


def _header(metadata: Mapping[str, str], tensors: Tensors, names: Iterable[str]) -> bytes:
    """The file's bytes up to the first tensor."""
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        code = _CODE_OF_DTYPE[tensors[name].dtype]
        described[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _digest_of(head: bytes | bytearray) -> bytes:
    state = xxhash.xxh3_128(head[: _DIGEST.start])
    state.update(b"0" * 32)
    state.update(memoryview(head)[_DIGEST.stop :])  # a copy may be as large as the file
    return state.hexdigest().encode()


def _read_start(descriptor: int, size: int) -> bytearray:
    """The file's bytes up to the first tensor, as its first bytes say."""
    if size < 8:
        raise DamagedFile(f"it must have at least 8 bytes; it has {size}")
    length = bytearray(8)
    _read_all(descriptor, [memoryview(length)], 0)
    (count,) = struct.unpack("<Q", length)
    if count > min(HEADER_LIMIT_BYTES, size - 8):
        raise DamagedFile(f"its header claims {count} bytes of a file of {size}")
    head = bytearray(8 + count)
    _read_all(descriptor, [memoryview(head)], 0)
    return head


def _read_header(descriptor: int, size: int, digest: str | None = None) -> Header:
    head = _read_start(descriptor, size)
    if head[8 : _DIGEST.start] != _START or head[_DIGEST] != _digest_of(head):
        raise DamagedFile("its header does not match its digest")
    if digest is not None and head[_DIGEST] != digest.encode():
        raise DamagedFile("it is not the file that the index names")
    try:
        return _parsed(json.loads(head[8:], parse_constant=_refused), len(head), size, head[_DIGEST].decode())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedFile(f"its header can't be read ({type(error).__name__})") from None


def _parsed(content: dict[str, Any], begin: int, size: int, digest: str) -> Header:
    """Check what a header says. Its digest is right, so this only refuses what someone else wrote on purpose."""
    metadata = content.pop("__metadata__")
    _typed(metadata, _METADATA)
    key, chunk, provenance = (
        json.loads(metadata[name], parse_constant=_refused) for name in ("key", "chunk", "provenance")
    )
    _check_record(key)
    if chunk is not None:
        _typed(chunk, _CHUNK)
    if not _is_flat(provenance):
        raise ValueError("provenance")
    if metadata["format"] != str(FORMAT_VERSION):
        raise ValueError("format")
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, given in content.items():
        dtype, item = _CODES[given["dtype"]]
        shape, (start, stop) = given["shape"], given["data_offsets"]
        if len(shape) > 8 or not all(type(n) is int and 0 <= n <= size for n in (*shape, start, stop)):
            raise DamagedFile(f"tensor {name[:20]!r} has a shape or an offset that can't be")
        if stop - start != math.prod(shape) * item:
            raise DamagedFile(f"tensor {name[:20]!r} is not as long as its shape says")
        tensors[name] = (dtype, tuple(shape), begin + start)
    end = begin
    for name, (dtype, shape, at) in tensors.items():
        if at != end:
            raise DamagedFile(f"tensor {name[:20]!r} is not behind the one before it")
        end += math.prod(shape) * ITEM_BYTES[dtype]
    if end != size:
        raise DamagedFile(f"it must have {end} bytes; it has {size}")
    if tensors[TOKEN_IDS][:2] != ("int32", (int(metadata["tokens"]),)):
        raise DamagedFile("its token ids are misshapen")
    return Header(
        key=key,
        chunk=chunk,
        provenance=provenance,
        created=metadata["created"],
        digest=digest,
        payload=metadata["payload"],
        tensors=tensors,
    )


def _check_record(key: Any) -> None:
    _typed(key, _RECORD)
    _typed(key["model"], _MODEL)
    for each in key["after"]:
        if each is not None:
            _typed({"after": each}, {"after": str})


def _typed(value: Any, types: Mapping[str, Any]) -> None:
    """Check that a value is an object with exactly these members, of these types, and that the index can keep them."""
    if type(value) is not dict or value.keys() != types.keys():
        raise ValueError("members")
    for name, wanted in types.items():
        member = value[name]
        if not isinstance(member, wanted) or isinstance(member, bool):
            raise TypeError(name)
        if isinstance(member, str):
            member.encode()  # no half of a surrogate pair
        elif isinstance(member, int) and not -(2**63) <= member < 2**63:
            raise ValueError(name)


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and (isinstance(each, str | int | None) or (isinstance(each, float) and math.isfinite(each)))
        for name, each in value.items()
    )


def _refused(constant: str) -> None:
    raise ValueError(constant)
