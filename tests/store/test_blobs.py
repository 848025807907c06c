"""One entry's file: what is in it, and that no damage to it goes unnoticed."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from braidsdk.errors import InputError
from braidsdk.store import Slab, blobs

TEXT = "Zorbin is the capital of Aistonia: naïve, ünïcode and \N{SNOWMAN}.\n"


def write(path: Path, make: Any, **changes: Any) -> Path:
    key = changes.pop("key", make.key("c" * 32, after=(None,)))
    given_: dict[str, Any] = {
        "key": key,
        "chunk": {"id": "c" * 32, "namespace": "default", "level": 1, "text": TEXT},
        "slabs": make.slabs(),
        "provenance": {"torch": "2.13"},
        "created": "2026-01-01T00:00:00+00:00",
        "mode": 0o644,
    }
    blobs.write(path, **(given_ | changes))
    return path


@pytest.fixture
def file(tmp_path: Path, make: Any) -> Path:
    return write(tmp_path / "entry.safetensors", make)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8])
def test_what_is_written_is_read_back(tmp_path: Path, make: Any, dtype: str, tokens: int) -> None:
    key = make.key("c" * 32, tokens=tuple(range(tokens)))
    slabs = make.slabs(3, dtype)
    blob = blobs.read(write(tmp_path / "e", make, key=key, slabs=slabs))
    assert make.content(blob.slabs) == make.content(slabs)
    assert [(slab.dtype, slab.shape) for slab in blob.slabs] == [(dtype, make.shape)] * 3
    assert blob.token_bytes == key.token_bytes
    assert (blob.header.key, blob.header.tokens, blob.header.page_size) == (key.record(), tokens, 4)
    assert blob.header.provenance == {"torch": "2.13"}
    assert blob.header.chunk is not None
    assert blob.header.chunk["text"] == TEXT


def test_safetensors_itself_reads_the_file(file: Path, make: Any) -> None:
    with safe_open(file, "np") as opened:
        assert sorted(opened.keys()) == ["layer.000", "layer.001", "layer.002", "token_ids"]
        assert opened.get_slice("layer.001").get_shape() == list(make.shape)
        assert opened.get_tensor("token_ids").tolist() == [5, 6, 7, 8, 9]
        assert opened.metadata()["page_size"] == "4"


def test_slabs_are_writable_views_of_one_buffer_aligned_to_their_items(tmp_path: Path, make: Any) -> None:
    for dtype, item in (("bfloat16", 2), ("float32", 4)):
        blob = blobs.read(write(tmp_path / dtype, make, slabs=make.slabs(0, dtype)))
        arrays = [np.frombuffer(slab.data, dtype=np.uint8) for slab in blob.slabs]
        assert all(array.flags.writeable and array.ctypes.data % item == 0 for array in arrays)
        assert arrays[1].ctypes.data == arrays[0].ctypes.data + arrays[0].nbytes


def place(make: Any, **changes: Any) -> blobs.Place:
    """Memory for three layers, each in pieces of 100 bytes and the rest."""
    shape = changes.get("shape", make.shape)
    memory = [memoryview(bytearray(2 * math.prod(shape))) for _ in range(changes.get("layers", 3))]
    buffers = [[layer[:100], layer[100:]] for layer in memory]
    return blobs.Place(changes.get("dtype", "bfloat16"), shape, buffers)


def test_slabs_are_read_into_memory_that_fits(tmp_path: Path, make: Any) -> None:
    slabs, into = make.slabs(4), place(make)
    blob = blobs.read(write(tmp_path / "e", make, slabs=slabs), into)
    assert blob.slabs is None
    assert [b"".join(layer) for layer in into.buffers] == make.content(slabs)
    assert blob.token_bytes == make.key("c" * 32).token_bytes


@pytest.mark.parametrize("other", [{"dtype": "float16"}, {"shape": (2, 4, 2, 2, 4)}, {"layers": 2}], ids=str)
def test_slabs_that_do_not_fit_get_memory_of_their_own(file: Path, make: Any, other: dict[str, Any]) -> None:
    into = place(make, **other)
    blob = blobs.read(file, into)
    assert blob.slabs is not None
    assert make.content(blob.slabs) == make.content(blobs.read(file).slabs)
    assert not any(any(piece) for layer in into.buffers for piece in layer)


@pytest.mark.parametrize("position", [0.02, 0.5, 0.99])
def test_damage_is_found_in_memory_that_fits_too(file: Path, make: Any, position: float) -> None:
    content = bytearray(file.read_bytes())
    content[-1 - int(position * 3 * len(make.slabs()[0].data))] ^= 1
    file.write_bytes(content)
    with pytest.raises(blobs.DamagedFile, match="digest"):
        blobs.read(file, place(make))


def test_the_file_gets_the_mode_that_was_asked_for(tmp_path: Path, make: Any) -> None:
    assert write(tmp_path / "e", make, mode=0o640).stat().st_mode & 0o777 == 0o640


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), end=st.sampled_from(["any", "header", "tail"])
)
def test_no_flipped_bit_gives_wrong_data(file: Path, position: float, bit: int, end: str) -> None:
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    low, high = {"any": (0, len(good)), "header": (0, header), "tail": (len(good) - 64, len(good))}[end]
    damaged = bytearray(good)
    damaged[low + int(position * (high - low))] ^= 1 << bit
    assert_damage_or_same(file.with_name("flipped"), bytes(damaged), good)


def test_no_flipped_bit_of_the_header_gives_wrong_data(file: Path) -> None:
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    harmless = 0
    for position in range(header):
        for bit in (0, 1, 2, 3, 4, 5, 6, 7):
            damaged = bytearray(good)
            damaged[position] ^= 1 << bit
            harmless += assert_damage_or_same(file.with_name("flipped"), bytes(damaged), good)
    assert harmless < 20  # "\u00ef" and "\u00EF" are the same letter


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True))
def test_no_truncation_gives_wrong_data(file: Path, position: float) -> None:
    good = file.read_bytes()
    file.with_name("cut").write_bytes(good[: int(position * len(good))])
    with pytest.raises(blobs.DamagedFile):
        blobs.read(file.with_name("cut"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=300))
def test_junk_is_damage_and_nothing_else(file: Path, junk: bytes) -> None:
    for content in (junk, len(junk).to_bytes(8, "little") + junk, file.read_bytes() + junk + b"x"):
        file.with_name("junk").write_bytes(content)
        with pytest.raises(blobs.DamagedFile):
            blobs.read(file.with_name("junk"))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b'{"__metadata__":null}',
        b'{"__metadata__":{},"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        b'{"__metadata__":{},"x":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"__metadata__":{},"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 100_000,
    ],
    ids=["a list", "nothing", "no metadata", "negative", "fraction", "unknown dtype", "deep"],
)
def test_a_header_that_makes_no_sense_is_damage(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "e"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(blobs.DamagedFile):
        blobs.read(path)


@pytest.mark.parametrize(
    ("a", "b", "dtype", "size"),
    [([0, 1], [1, 5], "F32", 5), ([0, 4], [0, 4], "I8", 4), ([0, 4], [8, 12], "I8", 12)],
    ids=["unaligned", "overlapping", "a gap"],
)
def test_tensors_that_are_not_side_by_side_are_damage(
    tmp_path: Path, a: list[int], b: list[int], dtype: str, size: int
) -> None:
    tensors = {
        "__metadata__": {},
        "a": {"dtype": "I8", "shape": [a[1]], "data_offsets": a},
        "b": {"dtype": dtype, "shape": [1 if dtype == "F32" else 4], "data_offsets": b},
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "e").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(blobs.DamagedFile, match="tensor 'b' is not where its neighbours"):
        blobs.read_header(tmp_path / "e")


def test_a_header_that_gives_the_same_bytes_another_shape_is_damage(file: Path) -> None:
    good = file.read_bytes()
    damaged = good.replace(b"[2,2,2,4,4]", b"[2,2,4,2,4]")
    assert damaged != good
    assert not assert_damage_or_same(file.with_name("reshaped"), damaged, good)


def test_a_safetensors_file_of_others_is_damage(tmp_path: Path) -> None:
    save_file({"x": np.zeros(4, dtype=np.float32)}, tmp_path / "e")
    with pytest.raises(blobs.DamagedFile):
        blobs.read(tmp_path / "e")


def test_slabs_that_are_not_the_keys_are_refused_and_leave_nothing(tmp_path: Path, make: Any) -> None:
    good = make.slabs()
    one = good[0]
    bad = {
        "layers": good[:2],
        "dtype": [dataclasses.replace(one, dtype="complex64"), *good[1:]],
        "size": [Slab("bfloat16", one.shape, one.data[2:]), *good[1:]],
        "heads": [Slab("bfloat16", (2, 2, 4, 4, 2), slab.data) for slab in good],
        "rank": [Slab("bfloat16", (2, 2, 2, 16), slab.data) for slab in good],
        "alike": [Slab("bfloat16", (2, 4, 2, 2, 4), one.data), *good[1:]],
        "strided": [Slab("bfloat16", one.shape, memoryview(np.zeros(512, dtype=np.uint8))[::2]), *good[1:]],
    }
    for name, slabs in bad.items():
        with pytest.raises(InputError, match="must"):
            write(tmp_path / name, make, slabs=slabs)
    with pytest.raises(InputError, match="room for 9 tokens"):
        write(tmp_path / "room", make, key=make.key("c" * 32, tokens=tuple(range(9))))
    with pytest.raises(InputError, match="provenance"):
        write(tmp_path / "provenance", make, provenance={"x": object()})
    assert list(tmp_path.iterdir()) == []


def assert_damage_or_same(path: Path, damaged: bytes, good: bytes) -> bool:
    """Whether the damage was harmless; fails if it is neither noticed nor harmless."""
    path.write_bytes(damaged)
    try:
        blob = blobs.read(path)
    except blobs.DamagedFile:
        return False
    path.write_bytes(good)
    assert blob == blobs.read(path)
    return True
