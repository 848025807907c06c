"""How fast the store reads and writes entries, beside plain reads and writes of the same bytes in the same run.

    python benchmarks/store.py

An entry is 512 tokens of Qwen3-0.6B's geometry in bfloat16, 58.7 MB. Reading is from the page cache into memory that
the caller owns, all digests checked; writing is durable, both ways. Rounds alternate between the two. Looking up and
opening are measured on an index of a million entries without files. Space is what lines of text take in files (of that
geometry) and in a pool's pages, over what the keys and values of their tokens are.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from ttft import cpu_name

from braidsdk.store import Array, ChunkStore, EntryKey, ModelIdentity, NewChunk, Tensors, entries, sha256_of_tokens
from braidsdk.store.entries import EntryRow
from braidsdk.testing import FakeBraid

Row = dict[str, Any]

MODEL = ModelIdentity("w" * 32, "t" * 32, "bfloat16", "plain", 28, 8, 128, '{"rope_theta":1000000.0}')
TOKENS, PAGE = 512, 128
LAYER_BYTES = 2 * 2 * MODEL.kv_heads * TOKENS * MODEL.head_dim
MANY, ROUNDS = 64, 9
INDEXED, LOOKED_UP, LINES, LINE_TOKENS = 1_000_000, 1_000, 1_000, 24


def tensors(memory: "np.ndarray[Any, np.dtype[np.uint8]]", tokens: int = TOKENS) -> Tensors:
    """An entry in memory, in pieces of a page as a CPU's pool has them."""
    piece, layer_bytes = 2 * MODEL.head_dim * min(PAGE, tokens), 4 * MODEL.kv_heads * tokens * MODEL.head_dim
    found = {}
    for layer in range(MODEL.layers):
        data = memory[layer * layer_bytes : (layer + 1) * layer_bytes].data
        pieces = [data[at : at + piece] for at in range(0, layer_bytes, piece)]
        found[f"layer.{layer:03d}"] = Array("bfloat16", (2, MODEL.kv_heads, tokens, MODEL.head_dim), pieces)
    return found


def key_of(chunk: str, tokens: int = TOKENS) -> EntryKey:
    return EntryKey(MODEL, "default", chunk, 1, tuple(range(tokens)), (), sha256_of_tokens(()))


def seconds(run: Callable[[], object]) -> float:
    started = perf_counter()
    run()
    return perf_counter() - started


def beside(ours: Callable[[], object], plain: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of both, round by round."""
    ours(), plain()
    pairs = [(seconds(ours), seconds(plain)) for _ in range(ROUNDS)]
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def row(what: str, nbytes: int, ours: list[float], plain: list[float], required: float) -> Row:
    ratios = sorted(theirs / mine for mine, theirs in zip(ours, plain, strict=True))
    return {
        "what": what,
        "bytes": nbytes,
        "seconds": statistics.median(ours),
        "plain_seconds": statistics.median(plain),
        "of_plain_speed": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "required": required,
    }


def read(store: ChunkStore, keys: list[EntryKey], place: Callable[[EntryKey], Tensors]) -> None:
    if not all(store.stream(keys, place)):
        raise SystemExit("an entry was not read")


def plainly_read(paths: list[Path], memory: list["np.ndarray[Any, np.dtype[np.uint8]]"]) -> None:
    for path, buffer in zip(paths, memory, strict=True):
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer.data)


def plainly_written(path: Path, memory: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
    with path.open("wb", buffering=0) as file:
        file.write(memory.data)
        os.fsync(file.fileno())
    path.unlink()


def reading(folder: Path) -> list[Row]:
    found = []
    with ChunkStore(folder) as store:
        chunks = store.add_chunks([NewChunk("default", 1, f"{n}") for n in range(MANY)])
        keys = [key_of(chunk.id) for chunk in chunks]
        data = np.random.default_rng(0).integers(0, 256, MODEL.layers * LAYER_BYTES, np.uint8)
        for key in keys:
            store.publish([(key, tensors(data), {})])
        paths = [hit.path for hit in store.look_up(keys) if hit]
        for count, name in ((1, "load 1 entry"), (MANY, f"load {MANY} entries")):
            some = keys[:count]
            memory = [np.empty(path.stat().st_size, np.uint8) for path in paths[: min(count, 4)]]
            plain = [memory[at % len(memory)] for at in range(count)]
            into = {key: plain[at] for at, key in enumerate(some)}

            ours = partial(read, store, some, lambda key, into=into: tensors(into[key]))
            theirs = partial(plainly_read, paths[:count], plain)
            found.append(row(name, count * data.nbytes, *beside(ours, theirs), 0.6 if count == 1 else 0.7))
    return found


def writing(folder: Path) -> Row:
    data = np.random.default_rng(0).integers(0, 256, MODEL.layers * LAYER_BYTES, np.uint8)
    with ChunkStore(folder) as store:
        chunks = iter(store.add_chunks([NewChunk("default", 1, f"{n}") for n in range(ROUNDS + 1)]))
        ours, plain = beside(
            lambda: store.publish([(key_of(next(chunks).id), tensors(data), {})]),
            lambda: plainly_written(folder / "tmp" / "plain", data),
        )
    return row("put 1 entry, durable", data.nbytes, ours, plain, 0.8)


def indexed(folder: Path) -> list[Row]:
    """Times on a large index."""
    rng = random.Random(0)
    with ChunkStore(folder) as store:
        (chunk,) = store.add_chunks([NewChunk("default", 1, "text")])
        keys = [replace(key_of(chunk.id, 8), after=(f"{n:032x}",)) for n in range(LOOKED_UP)]
        mine = [
            EntryRow(
                digest=k.digest,
                chunk_id=chunk.id,
                record=k.record_json,
                tokens_sha256=k.token_sha256,
                tokens=8,
                bytes=1,
                size=1,
                payload_digest="0" * 32,
                chunks=k.chunk_ids(),
            )
            for k in keys
        ]
        with store._index.write() as db:
            entries.insert(db, mine)
        for _ in range(0, INDEXED - LOOKED_UP, 50_000):
            some = [replace(mine[0], digest=f"{rng.getrandbits(128):032x}", chunks=(chunk.id,)) for _ in range(50_000)]
            with store._index.write() as db:
                entries.insert(db, some)
        looks = [seconds(lambda: store.look_up(keys)) for _ in range(ROUNDS)]
        if not all(store.look_up(keys)):
            raise SystemExit("an entry was not found")
    opens = [seconds(lambda: ChunkStore(folder).close()) for _ in range(ROUNDS)]
    words = f"of {INDEXED:,} entries"
    return [
        {"what": f"look up {LOOKED_UP:,} keys {words}", "seconds": statistics.median(looks), "required": 0.05},
        {"what": f"open an index {words}", "seconds": statistics.median(opens), "required": 0.2},
    ]


def space(folder: Path) -> list[Row]:
    """What short texts take on disk and in memory, by what their tokens take."""
    data = np.zeros(MODEL.layers * 4 * MODEL.kv_heads * LINE_TOKENS * MODEL.head_dim, np.uint8)
    with ChunkStore(folder / "disk") as store:
        chunks = store.add_chunks([NewChunk("default", 1, f"{n}") for n in range(LINES // 10)])
        keys = [key_of(chunk.id, LINE_TOKENS) for chunk in chunks]
        store.publish([(key, tensors(data, LINE_TOKENS), {}) for key in keys])
        taken = sum(hit.path.stat().st_blocks * 512 for hit in store.look_up(keys) if hit)
    disk = taken / (len(keys) * data.nbytes)
    with FakeBraid({}, store=folder / "pool") as braid:
        anchor = braid.register_system("You answer.")
        used = braid.stats().pool_used_bytes
        lines = braid.register_many([f"{n:03d}: a line of twenty" for n in range(LINES)], anchor=anchor, progress=False)
        pool = braid._engine.pool
        tokens = sum(len(line.token_ids) for line in lines)
        memory = (braid.stats().pool_used_bytes - used) / (tokens * pool.page_bytes // pool.page_size)
    return [
        {"what": f"{len(keys)} lines of {LINE_TOKENS} tokens, on disk", "times": disk, "required": 1.3},
        {"what": f"{LINES:,} lines of {tokens / LINES:.0f} tokens, in the pool", "times": memory, "required": 2.0},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.json")
    parser.add_argument("--scratch", type=Path, help="folder for stores, 5 GB; default: the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        parts = {name: Path(scratch, name) for name in ("read", "write", "index", "space")}
        rows = [writing(parts["write"]), *reading(parts["read"]), *indexed(parts["index"]), *space(parts["space"])]
    report = {"command": "python benchmarks/store.py", "cpu": cpu_name(), "rows": rows}
    for each in rows:
        sys.stderr.write(f"{json.dumps(each)}\n")
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
