"""Small keys and tensors for the store's tests, which `worker.py` uses in other processes; and the campaign's counts.

pytest -m campaign tests/store --counts benchmarks/results/store_campaign.json
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braidsdk.store import Array, ChunkStore, EntryKey, ModelIdentity, blobs, sha256_of_tokens

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
SHAPE = (2, MODEL.kv_heads, 8, MODEL.head_dim)


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


def make_tensors(seed: int = 0, dtype: str = "bfloat16") -> dict[str, Array]:
    random = np.random.default_rng(seed)
    size = int(np.prod(SHAPE)) * {"bfloat16": 2, "float32": 4, "int8": 1}[dtype]
    data = [memoryview(random.integers(0, 256, size, dtype=np.uint8)) for _ in range(MODEL.layers)]
    return {f"layer.{layer:03d}": Array(dtype, SHAPE, [each[:50], each[50:]]) for layer, each in enumerate(data)}


def content(tensors: Any) -> dict[str, bytes]:
    return {name: b"".join(each.buffers) for name, each in tensors.items()}


def header_of(file: bytes) -> dict[str, Any]:
    """The header of an entry's file."""
    header: dict[str, Any] = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return header


def headed(file: bytes, text: bytes) -> bytes:
    """An entry's file with another header, whose digest is right if the text has its place."""
    head = bytearray(len(text).to_bytes(8, "little") + text)
    if len(head) >= blobs._DIGEST.stop:
        head[blobs._DIGEST] = blobs._digest_of(head)
    return bytes(head) + file[8 + int.from_bytes(file[:8], "little") :]


@pytest.fixture
def make() -> Any:
    """The helpers of this file, for tests: `make.key`, `make.tensors`, `make.content`, `make.model`, and so on."""

    class Make:
        key = staticmethod(make_key)
        tensors = staticmethod(make_tensors)
        content = staticmethod(content)
        header_of = staticmethod(header_of)
        headed = staticmethod(headed)
        model = MODEL
        shape = SHAPE

    return Make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--counts", metavar="FILE", help="write the campaign's counts to FILE, as JSON")


@pytest.fixture
def counted(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Count cases of one kind, for the campaign's table: `counted("EIO at one step", 579, wrong=0)`. The parts that run
    always are not counted."""

    def count(what: str, cases: int, *, wrong: int = 0) -> None:
        if request.node.get_closest_marker("campaign"):
            record_property("campaign", {"what": what, "cases": cases, "wrong": wrong})

    return count


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the counts of all tests that ran, whether they passed or failed."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    rows = [value for report in reports for name, value in report.user_properties if name == "campaign"]
    if not rows:
        return
    terminalreporter.section("campaign: cases, and how many of them were wrong")
    for row in rows:
        terminalreporter.write_line(f"{row['cases']:>9,} {row['wrong']:>6,}  {row['what']}")
    if path := config.getoption("--counts", None):
        Path(path).write_text(json.dumps({"rows": rows}, indent=1) + "\n")


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a program of `campaign/` prints as JSON: `campaign("steps.py", "--every", "29", preload="faults.c")`."""
    programs, built = Path(__file__).parent / "campaign", tmp_path_factory.mktemp("campaign")

    def library(source: str) -> Path:
        compiler, made = shutil.which("cc"), (built / source).with_suffix(".so")
        if sys.platform != "linux" or compiler is None:
            pytest.skip("needs Linux and a C compiler, to stand between a process and the system")
        if not made.exists():
            subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", made, programs / source, "-ldl"], check=True)
        return made

    def run(program: str, *arguments: str, preload: str | None = None) -> Any:
        environment = {**os.environ, **({"LD_PRELOAD": str(library(preload))} if preload else {})}
        command = [sys.executable, str(programs / program), *arguments]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)

    return run


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
