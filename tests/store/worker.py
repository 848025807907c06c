"""What `test_processes.py` runs in other processes: `python worker.py <job> <store> <number>`."""

import sys
import time
from pathlib import Path

from conftest import content, make_key, make_tensors

from braidsdk.store import ChunkStore, Entry, EntryKey, NewChunk, sha256_of_tokens

ROUNDS = 12


def keys_of(store: ChunkStore, count: int = ROUNDS) -> list[EntryKey]:
    rows = store.add_chunks([NewChunk("default", 1, f"text {i}\n", f"name {i}") for i in range(count)])
    return [make_key(row.id) for row in rows]


def publish(store: ChunkStore, number: int) -> None:
    """All processes publish the same entries, each in its own order."""
    keys = keys_of(store)
    for i in range(ROUNDS):
        at = (i * (number * 2 + 1)) % ROUNDS
        store.publish([(keys[at], make_tensors(at), {"writer": number})])
        (entry,) = store.load([keys[at]])
        assert isinstance(entry, Entry), entry
        assert content(entry.tensors) == content(make_tensors(at))


def churn(store: ChunkStore, number: int) -> None:
    """Some publish and load, one deletes, one damages: never wrong data, never an error but an unknown chunk."""
    from braidsdk.errors import UnknownChunkError

    end = time.monotonic() + 2.0
    i = number
    while time.monotonic() < end:
        i += 1
        at = i % 3
        (key,) = keys_of(store, 3)[at : at + 1]
        if number == 0:
            store.delete_chunk("default", str(key.chunk_id))
            time.sleep(0.005)
        elif number == 1:
            for path in store.path.glob("entries/*/*.safetensors"):
                try:
                    damaged = bytearray(path.read_bytes())
                    damaged[i % len(damaged)] ^= 1
                    other = path.with_name("damaging")
                    other.write_bytes(damaged)
                    other.replace(path)
                except FileNotFoundError:
                    pass
            time.sleep(0.01)
        else:
            try:
                store.publish([(key, make_tensors(at), {})])
            except UnknownChunkError:
                continue
            (entry,) = store.load([key])
            if isinstance(entry, Entry):
                assert content(entry.tensors) == content(make_tensors(at))


def write_for_ever(store: ChunkStore, number: int) -> None:
    """Publishes until it is killed, and says so at the first."""
    i = 0
    while True:
        i += 1
        key = make_key(None, tokens=(number, i % 4096), after_sha256=sha256_of_tokens((i,)))
        store.publish([(key, make_tensors(number), {})])
        if i == 3:
            print("writing", flush=True)  # noqa: T201 - the test waits for it


if __name__ == "__main__":
    with ChunkStore(Path(sys.argv[2])) as opened:
        {"publish": publish, "churn": churn, "write": write_for_ever}[sys.argv[1]](opened, int(sys.argv[3]))
