"""Small keys and slabs for the store's tests; `worker.py` uses them in other processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braidsdk.store import ChunkStore, EntryKey, ModelIdentity, Slab, sha256_of_tokens

MODEL = ModelIdentity(
    weights="a1" * 16,
    tokenizer="b2" * 16,
    dtype="bfloat16",
    codec="plain",
    layers=3,
    kv_heads=2,
    head_dim=4,
    rope='{"rope_theta":1000000.0,"rope_type":"default"}',
)
SHAPE = (2, 2, MODEL.kv_heads, 4, MODEL.head_dim)  # two pages of four tokens


def make_key(chunk: str | None, *, tokens: tuple[int, ...] = (5, 6, 7, 8, 9), **changes: Any) -> EntryKey:
    given: dict[str, Any] = {
        "model": MODEL,
        "namespace": "default",
        "chunk_id": chunk,
        "level": 1,
        "token_ids": tokens,
        "after": (),
        "after_sha256": sha256_of_tokens(()),
    }
    return EntryKey(**(given | changes))


def make_slabs(seed: int = 0, dtype: str = "bfloat16") -> list[Slab]:
    random = np.random.default_rng(seed)
    size = int(np.prod(SHAPE)) * {"bfloat16": 2, "float32": 4, "int8": 1}[dtype]
    return [Slab(dtype, SHAPE, memoryview(random.integers(0, 256, size, dtype=np.uint8))) for _ in range(MODEL.layers)]


def content(slabs: Any) -> list[bytes]:
    return [bytes(slab.data) for slab in slabs]


@pytest.fixture
def make() -> Any:
    """The helpers of this file, for tests: `make.key`, `make.slabs`, `make.content`, `make.model`."""

    class Make:
        key = staticmethod(make_key)
        slabs = staticmethod(make_slabs)
        content = staticmethod(content)
        model = MODEL
        shape = SHAPE

    return Make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[ChunkStore]:
    with ChunkStore(folder) as opened:
        yield opened


@pytest.fixture
def chunk(store: ChunkStore) -> str:
    """The id of a registered chunk."""
    return store.add_chunk(namespace="default", level=1, text="The capital of Aistonia is Zorbin.\n").id
