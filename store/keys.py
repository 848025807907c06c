"""The names of chunks, and the keys of their computed KV entries.

This module holds pure data and pure functions: nothing here reads a file or a database. A key holds everything that
changes what a KV entry contains, so two equal keys may share one entry and two different keys never do. Things that
change only rounding (device, kernel, library versions) are provenance and not part of a key.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from braidsdk.errors import InputError

FORMAT_VERSION = 2
"""Version of the layout of an entry's file. Raise it when the same KV values are written in another way."""

ALGORITHM_VERSION = 1
"""Version of how KV values are computed. Raise it when the same tokens and weights give other values."""

MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True)
class ModelIdentity:
    """Everything about a model that changes the KV values that it computes.

    Attributes:
        weights: fingerprint of the weights' content, hex.
        tokenizer: fingerprint of the tokenizer's content, hex.
        dtype: torch name of the dtype that KV values are computed in, such as "bfloat16".
        codec: how the values are packed in the file, such as "plain".
        layers: number of layers.
        kv_heads: KV heads per layer.
        head_dim: dimensions per head.
        rope: canonical JSON of the full RoPE config.
    """

    weights: str
    tokenizer: str
    dtype: str
    codec: str
    layers: int
    kv_heads: int
    head_dim: int
    rope: str


@dataclass(frozen=True)
class EntryKey:
    """Names one KV entry: a chunk that one model computed after given chunks; or an overlay, which is what a mode has
    computed again of a composition.

    Attributes:
        model: the model that computes it.
        namespace: namespace of the chunk.
        chunk_id: the chunk, or None for the bare prompt header and for an overlay, which belong to no chunk.
        level: level of the chunk, or `LEVEL_OVERLAY`.
        token_ids: the chunk's token ids under this model, at least one, each in [0, 2**31).
        after: ids of the chunks that it was computed after, in order. None stands for the bare prompt header. Those of
            an overlay are all chunks of its composition.
        after_sha256: `sha256_of_tokens` of all token ids that it was computed after; for an overlay, the SHA-256 of all
            that its values follow from.

    Raises:
        InputError: there are no token ids, or one is out of range.
    """

    model: ModelIdentity
    namespace: str
    chunk_id: str | None
    level: int
    token_ids: tuple[int, ...]
    after: tuple[str | None, ...]
    after_sha256: str

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InputError("token_ids must hold at least one token id; got none. Tokenize the chunk's text first.")
        _ = self.token_bytes  # refuses ids out of range now instead of at the first use

    def __hash__(self) -> int:
        return hash(self.digest)  # there may be many token ids, and keys are looked up often

    @cached_property
    def token_bytes(self) -> bytes:
        """The token ids as little-endian int32."""
        return _token_bytes(self.token_ids)

    @cached_property
    def token_sha256(self) -> str:
        """SHA-256 of the token ids, hex. It resists collisions, which the digest does not."""
        return hashlib.sha256(self.token_bytes).hexdigest()

    @cached_property
    def record_json(self) -> str:
        """`record()` as canonical JSON. Equal strings mean equal records."""
        return canonical_json(self.record())

    @cached_property
    def digest(self) -> str:
        """32 hex digits by which the entry is found: xxh3_128 of the length-prefixed record and the token ids.

        xxhash does not resist collisions. So the code that finds an entry by it also compares the record and the token
        ids.
        """
        return digest_of(self.record_json, self.token_bytes)

    def record(self) -> dict[str, Any]:
        """Everything except the token ids, as plain JSON values."""
        return {
            "format": FORMAT_VERSION,
            "algorithm": ALGORITHM_VERSION,
            "model": {**vars(self.model)},  # asdict makes deep copies, which took most of the time of making a key
            "namespace": self.namespace,
            "chunk_id": self.chunk_id,
            "level": self.level,
            "after": list(self.after),
            "after_sha256": self.after_sha256,
        }

    def chunk_ids(self) -> tuple[str, ...]:
        """The ids of the entry's chunk and of every chunk that it was computed after, each once."""
        return record_chunk_ids(self.record())


@dataclass(frozen=True)
class Difference:
    """One way in which a stored entry differs from a wanted one.

    Attributes:
        reason: one word, such as "dtype".
        words: a text for people, such as "computed in float32; this model runs in bfloat16".
    """

    reason: str
    words: str


def chunk_id(namespace: str, level: int, text: str) -> str:
    """Return a chunk's id: 32 hex digits, xxh3_128 over level, namespace and text with their lengths.

    It does not depend on a model, so it stays the same if the model changes.

    Raises:
        InputError: the namespace or the text can't be written as UTF-8.
    """
    space, body = _utf8(namespace, "namespace"), _utf8(text, "text")
    return xxhash.xxh3_128_hexdigest(f"{level}:{len(space)}:{len(body)}:".encode() + space + body)


def digest_of(record_json: str, token_bytes: bytes) -> str:
    """Return the digest of a canonical key record and token ids as little-endian int32."""
    return xxhash.xxh3_128_hexdigest(_prefixed(record_json.encode()) + token_bytes)


def record_chunk_ids(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The ids of a key record's chunk and of every chunk that its entry was computed after, each once."""
    return tuple(dict.fromkeys(chunk for chunk in (record["chunk_id"], *record["after"]) if chunk is not None))


def looks_like_chunk_id(name: str) -> bool:
    """Whether a name could be taken for a chunk id: 32 hex digits."""
    return len(name) == 32 and all(digit in "0123456789abcdefABCDEF" for digit in name)


def sha256_of_tokens(token_ids: Iterable[int]) -> str:
    """Return the SHA-256 of token ids as little-endian int32, hex. There may be no ids."""
    return hashlib.sha256(_token_bytes(tuple(token_ids))).hexdigest()


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Name what differs between two key records of one namespace, the most important difference first.

    Token hashes depend on the tokenizer. A difference that follows from one that is named already is not named again.
    """
    model, other = wanted["model"], found["model"]
    named: list[Difference] = []

    def note(reason: str, words: str) -> None:
        if all(difference.reason != reason for difference in named):
            named.append(Difference(reason, words))

    for field in ("format", "algorithm"):
        if wanted[field] != found[field]:
            note("version", f"computed by {field} version {found[field]}; this one is version {wanted[field]}")
    if model["weights"] != other["weights"]:
        note("model", f"computed with other weights ({other['weights'][:12]}); this model has {model['weights'][:12]}")
    for field in ("layers", "kv_heads", "head_dim"):
        if model[field] != other[field]:
            note("model", f"computed with {field} = {other[field]}; this model has {model[field]}")
    if model["tokenizer"] != other["tokenizer"]:
        ids = (other["tokenizer"][:12], model["tokenizer"][:12])
        note("tokenizer", f"computed with another tokenizer ({ids[0]}); this model has {ids[1]}")
    if model["dtype"] != other["dtype"]:
        note("dtype", f"computed in {other['dtype']}; this model runs in {model['dtype']}")
    if model["codec"] != other["codec"]:
        note("codec", f"packed as {other['codec']}; this model asks for {model['codec']}")
    if model["rope"] != other["rope"]:
        note("rope", "computed with another RoPE config; relocating its keys would be wrong")
    if wanted["level"] != found["level"]:
        note("level", f"computed as level {found['level']}; wanted as level {wanted['level']}")
    if _after_differs(wanted, found):
        note("after", f"computed {_after_words(found)}; wanted {_after_words(wanted)}")
    return tuple(named)


def _after_differs(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    same_ids = wanted["after"] == found["after"]
    same_tokens = wanted["after_sha256"] == found["after_sha256"]
    if wanted["model"]["tokenizer"] != found["model"]["tokenizer"]:
        return not same_ids
    return not (same_ids and same_tokens)


def _after_words(record: Mapping[str, Any]) -> str:
    after: Sequence[str | None] = record["after"]
    if not after:
        return "on its own"
    names = ["the bare prompt header" if chunk is None else f"chunk {chunk[:8]}" for chunk in after]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"after {', '.join(names[:3])}{more} (tokens {record['after_sha256'][:8]})"


def _prefixed(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The {what} must hold whole Unicode characters; got half a surrogate pair at character {error.start}. "
            f"Decode the {what} with errors='replace' where it is read."
        ) from None


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.size and (ids.ndim != 1 or ids.min() < 0 or ids.max() > MAX_TOKEN_ID):
        raise InputError(
            f"token_ids must be a flat sequence of token ids from 0 to {MAX_TOKEN_ID}; got others. Pass the ids that "
            "the model's tokenizer gives."
        )
    return ids.astype("<i4").tobytes()
