"""One entry's file: what is in it, and that no damage to it goes unnoticed."""

import dataclasses
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from braidsdk.errors import InputError
from braidsdk.store import Array, blobs

TEXT = "Zorbin is the capital of Aistonia: naïve, ünïcode and \N{SNOWMAN}.\n"


def write(path: Path, make: Any, **changes: Any) -> Path:
    key = changes.pop("key", make.key("c" * 32, after=(None,)))
    given_: dict[str, Any] = {
        "key": key,
        "chunk": {"id": "c" * 32, "namespace": "default", "level": 1, "text": TEXT},
        "tensors": make.tensors(),
        "provenance": {"torch": "2.13"},
        "created": "2026-01-01T00:00:00+00:00",
        "mode": 0o600,
    }
    blobs.write(path, **(given_ | changes))
    return path


@pytest.fixture
def file(tmp_path: Path, make: Any) -> Path:
    return write(tmp_path / "entry.safetensors", make)


Forge = Callable[[Callable[[dict[str, Any]], object]], Path]


@pytest.fixture
def forged(file: Path, make: Any) -> Forge:
    """Puts another header over the same tensors, with a digest that is right."""

    def forge(change: Callable[[dict[str, Any]], object]) -> Path:
        good = file.read_bytes()
        header = make.header_of(good)
        change(header)
        made = file.with_name("forged")
        made.write_bytes(make.headed(good, json.dumps(header, separators=(",", ":")).encode()))
        return made

    return forge


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_what_is_written_is_read_back(tmp_path: Path, make: Any, dtype: str, tokens: int) -> None:
    key = make.key("c" * 32, tokens=tuple(range(tokens)))
    tensors = make.tensors(3, dtype)
    blob = blobs.read(write(tmp_path / "e", make, key=key, tensors=tensors))
    assert make.content(blob.tensors) == make.content(tensors)
    assert {name: (each.dtype, each.shape) for name, each in blob.tensors.items()} == dict.fromkeys(
        tensors, (dtype, make.shape)
    )
    assert blob.token_bytes == key.token_bytes
    assert (blob.header.key, blob.header.tokens) == (key.record(), tokens)
    assert blob.header.nbytes == sum(each.nbytes for each in tensors.values())
    assert blob.header.provenance == {"torch": "2.13"}
    assert blob.header.chunk is not None
    assert blob.header.chunk["text"] == TEXT


def test_tensors_of_many_dtypes_and_pieces_are_aligned_and_read_back(tmp_path: Path, make: Any) -> None:
    """More bytes than are read at a time, and more pieces than one call takes."""
    random = np.random.default_rng(0)
    large, small = random.bytes(3 << 20), random.bytes(6000)
    tensors = {
        "a": Array("int8", (3, 1 << 20), [memoryview(large)]),
        "b": Array("float32", (1500,), [memoryview(small)[at : at + 2] for at in range(0, 6000, 2)]),
        "c": Array("float64", (0, 4), []),
    }
    path = write(tmp_path / "e", make, tensors=tensors)
    assert make.content(blobs.read(path).tensors) == {"a": large, "b": small, "c": b""}
    for dtype, _, at in blobs.read_header(path).tensors.values():
        assert at % blobs.ITEM_BYTES[dtype] == 0
    with safe_open(path, "np") as opened:
        assert opened.get_tensor("a").tobytes() == large
        assert opened.get_tensor("b").tobytes() == small


def test_safetensors_itself_reads_the_file(file: Path, make: Any) -> None:
    with safe_open(file, "np") as opened:
        assert sorted(opened.keys()) == ["layer.000", "layer.001", "layer.002", "token_ids"]
        assert opened.get_slice("layer.001").get_shape() == list(make.shape)
        assert opened.get_tensor("token_ids").tolist() == [5, 6, 7, 8, 9]
        assert opened.metadata()["format"] == "2"


def place(make: Any, **changes: Any) -> dict[str, Array]:
    """Memory for three layers, each in pieces of 100 bytes and the rest."""
    made = {}
    for name, each in make.tensors(**changes).items():
        memory = memoryview(bytearray(each.nbytes))
        made[name] = Array(each.dtype, each.shape, [memory[:100], memory[100:]])
    return made


def test_tensors_are_read_into_the_callers_memory(tmp_path: Path, make: Any) -> None:
    tensors, into = make.tensors(4), place(make)
    blob = blobs.read(write(tmp_path / "e", make, tensors=tensors), into)
    assert blob.tensors is into
    assert make.content(into) == make.content(tensors)
    assert blob.token_bytes == make.key("c" * 32).token_bytes


@pytest.mark.parametrize(
    "change",
    [
        lambda name, each: (name, dataclasses.replace(each, dtype="float16")),
        lambda name, each: (name, dataclasses.replace(each, shape=(2, 4, 4, 4))),
        lambda name, each: (name.replace("layer.002", "layer.003"), each),
    ],
    ids=["dtype", "shape", "name"],
)
def test_other_tensors_than_the_caller_expects_are_damage(file: Path, make: Any, change: Any) -> None:
    into = dict(change(name, each) for name, each in place(make).items())
    with pytest.raises(blobs.DamagedFile, match="other tensors"):
        blobs.read(file, into)
    assert not any(any(data) for data in make.content(into).values())


@pytest.mark.parametrize("position", [0.02, 0.5, 0.99])
def test_damage_is_found_in_the_callers_memory_too(file: Path, make: Any, position: float) -> None:
    content = bytearray(file.read_bytes())
    content[-1 - int(position * blobs.read_header(file).nbytes)] ^= 1
    file.write_bytes(content)
    with pytest.raises(blobs.DamagedFile, match="content does not match"):
        blobs.read(file, place(make))


def test_the_file_gets_the_mode_that_was_asked_for(tmp_path: Path, make: Any) -> None:
    assert write(tmp_path / "e", make, mode=0o640).stat().st_mode & 0o777 == 0o640


def test_what_is_no_regular_file_is_damage_and_is_not_waited_for(file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tmp_path)  # the path of a socket must be short
        listener.bind("socket")
        for name in ("pipe", "folder", "link", "loop", "socket"):
            for read in (blobs.read, blobs.read_header):
                with pytest.raises(blobs.DamagedFile, match=r"regular file|link"):
                    read(tmp_path / name)


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


def test_every_flipped_bit_of_the_header_is_damage(file: Path) -> None:
    good = file.read_bytes()
    for position in range(8 + int.from_bytes(good[:8], "little")):
        for bit in range(8):
            damaged = bytearray(good)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(blobs.DamagedFile):
                blobs.read_header(file)


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


def test_a_forged_header_that_says_the_same_is_read(file: Path, forged: Forge) -> None:
    assert blobs.read(forged(lambda _: None)).token_bytes == blobs.read(file).token_bytes


def test_a_header_that_names_its_digest_twice_has_the_one_that_counts(file: Path, make: Any) -> None:
    good = file.read_bytes()
    header = make.header_of(good)
    second = json.dumps(header[META] | {"digest": "0" * 32})
    file.write_bytes(
        make.headed(good, f'{json.dumps(header, separators=(",", ":"))[:-1]},"{META}":{second}}}'.encode())
    )
    assert blobs.read(file).header.digest.encode() == file.read_bytes()[blobs._DIGEST]


META = "__metadata__"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("token_ids"),
        lambda h: h["layer.001"].update(shape=[2, 4, 4, 4, 2]),
        lambda h: h["layer.001"].update(shape=[-2, -2, 8, 4]),
        lambda h: h["layer.001"].update(shape=[2.0, 2, 8, 4]),
        lambda h: h["layer.001"].update(shape=[2, True, 16, 4]),
        lambda h: h["layer.001"].update(shape=[1] * 100_000 + [128]),
        lambda h: h["layer.001"].update(shape=[10**4000, 0]),
        lambda h: h["layer.001"].update(dtype="F99"),
        lambda h: h["layer.001"].update(data_offsets=h["layer.000"]["data_offsets"]),
        lambda h: h["layer.001"].update(data_offsets=[-256, 0]),
        lambda h: h["layer.001"].update(data_offsets=[0]),
        lambda h: h["layer.002"].update(shape=[2, 2, 8, 3], data_offsets=[512, 512 + 192]),
        lambda h: h.update({str(n): {"dtype": "U8", "shape": [0], "data_offsets": [9, 9]} for n in range(1000)}),
        lambda h: h["token_ids"].update(dtype="F32"),
        lambda h: h["token_ids"].update(shape=[5, 1]),
        lambda h: h["token_ids"].update(shape=[]),
        lambda h: h[META].update(format="1"),
        lambda h: h[META].update(format=2),
        lambda h: h[META].update(created=["2026"]),
        lambda h: h[META].pop("payload"),
        lambda h: h[META].update(payload="0" * 32),
        lambda h: h[META].update(tokens="6"),
        lambda h: h[META].update(key="[" * 200_000),
        lambda h: h[META].update(key="[" * 900 + "]" * 900),
        lambda h: h[META].update(key=h[META]["key"].replace('"level":1', '"level":NaN')),
        lambda h: h[META].update(key=h[META]["key"].replace('"level":1', '"level":true')),
        lambda h: h[META].update(key=h[META]["key"].replace('"level":1', '"level":1e999')),
        lambda h: h[META].update(key=h[META]["key"].replace('"level":1', '"more":1')),
        lambda h: h[META].update(key=h[META]["key"].replace("[null]", "[7]")),
        lambda h: h[META].update(chunk='{"id":1}'),
        lambda h: h[META].update(chunk="NaN"),
        lambda h: h[META].update(provenance='{"x":' * 900 + "1" + "}" * 900),
        lambda h: h[META].update(provenance='{"x":Infinity}'),
        lambda h: h[META].update(provenance='{"x":1e999}'),
        lambda h: h[META].update(provenance="7" * 5000),
        lambda h: h[META].update(tokens=1e999),
        lambda h: h[META].update(more="x"),
        lambda h: h[META].update(created="\ud800"),
        lambda h: h[META].update(key=h[META]["key"].replace('"level":1', f'"level":{2**63}')),
        lambda h: h[META].update(key=h[META]["key"].replace('"default"', r'"\ud800"')),
        lambda h: h[META].update(key=h[META]["key"].replace("[null]", r'["\ud800"]')),
        lambda h: h[META].update(chunk=h[META]["chunk"].replace("Zorbin", r"\ud800")),
        lambda h: h.update({META: None}),
        lambda h: h.update({META: {"digest": "0" * 32}}),
        lambda h: h.update(x=7),
    ],
)
def test_a_forged_header_that_makes_no_sense_is_damage(forged: Forge, change: Any) -> None:
    """Its digest is right."""
    path = forged(change)
    with pytest.raises(blobs.DamagedFile):
        blobs.read(path)


@pytest.mark.parametrize("header", [b"", b"[]", b"{}", b"[" * 100_000, b'{"__metadata__":null}'])
def test_a_header_without_a_digest_is_damage(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "e"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(blobs.DamagedFile):
        blobs.read(path)
    assert not blobs.is_of_another_format(path)


def test_a_file_of_another_format_is_told_from_a_damaged_one(file: Path, forged: Forge) -> None:
    assert not blobs.is_of_another_format(file)
    assert blobs.is_of_another_format(forged(lambda header: header[META].update(format="3")))
    assert not blobs.is_of_another_format(file.with_name("absent"))


def test_a_safetensors_file_of_others_is_damage(tmp_path: Path) -> None:
    save_file({"x": np.zeros(4, dtype=np.float32)}, tmp_path / "e")
    with pytest.raises(blobs.DamagedFile):
        blobs.read(tmp_path / "e")


def test_tensors_that_can_not_be_written_are_refused_and_leave_nothing(tmp_path: Path, make: Any) -> None:
    good = make.tensors()
    one = good["layer.000"]
    bad = {
        "dtype": dataclasses.replace(one, dtype="complex64"),
        "size": Array("bfloat16", one.shape, one.buffers[1:]),
        "strided": Array("bfloat16", one.shape, [memoryview(np.zeros(512, dtype=np.uint8))[::2]]),
    }
    for name, tensor in bad.items():
        with pytest.raises(InputError, match="must"):
            write(tmp_path / name, make, tensors={**good, "layer.000": tensor})
    with pytest.raises(InputError, match="must not be called"):
        write(tmp_path / "name", make, tensors={**good, "token_ids": one})
    for value in (object(), float("nan"), [1], {"a": 1}):
        with pytest.raises(InputError, match="provenance"):
            write(tmp_path / "provenance", make, provenance={"x": value})
    assert list(tmp_path.iterdir()) == []


def assert_damage_or_same(path: Path, damaged: bytes, good: bytes) -> bool:
    """Whether the damage was harmless; fails if it is neither noticed nor harmless."""
    path.write_bytes(damaged)
    try:
        blob = blobs.read(path)
    except blobs.DamagedFile:
        return False
    path.write_bytes(good)
    assert (blob.header, blob.token_bytes) == (blobs.read(path).header, blobs.read(path).token_bytes)
    return True
