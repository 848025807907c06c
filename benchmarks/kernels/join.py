"""What a join and a leave of a running batch cost the host: microseconds, without a GPU.

    python benchmarks/kernels/join.py

Each request sees a system prompt, 8 chunks of 512 tokens of 256 by Zipf's law, and a tail of its own. The upload is the
copy on the host, into memory that is pageable here; on a GPU it is pinned, and a copy to the device is started.
"""

import argparse
import itertools
import random
import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from braidsdk.kernels.attention.launch import CONFIGS, SMALL_M, block_m, block_rows
from braidsdk.kernels.attention.live import LivePlan
from braidsdk.kernels.attention.tables import split_tables
from braidsdk.kernels.paging import PagedSegment, Request

PAGE, GROUP, KV_HEADS = 64, 2, 8
PROCESSORS = 132
CPU = torch.device("cpu")


class Requests:
    """Segments of one request after another."""

    def __init__(self, documents: int, seed: int = 0) -> None:
        self._state = random.Random(seed)
        self._pages = itertools.count()
        self._system = self._entry(4)
        self._documents = [self._entry(8) for _ in range(documents)]
        self._weights = [1 / rank for rank in range(1, documents + 1)]

    def _entry(self, pages: int) -> torch.Tensor:
        return torch.tensor(list(itertools.islice(self._pages, pages)))

    def draw(self) -> list[PagedSegment]:
        chosen: dict[int, None] = {}
        while len(chosen) < 8:
            chosen[self._state.choices(range(len(self._documents)), self._weights)[0]] = None
        origin, segments = 0, []
        for pages in (self._system, *(self._documents[index] for index in chosen), self._entry(4)):
            segments.append(PagedSegment(pages, 0, len(pages) * PAGE, origin))
            origin += len(pages) * PAGE
        return segments


def timed(run: Callable[[], object]) -> float:
    """Microseconds."""
    start = perf_counter()
    run()
    return (perf_counter() - start) * 1e6


def report(name: str, times: list[float]) -> None:
    deciles = statistics.quantiles(times, n=10)
    print(f"{name:40} median {statistics.median(times):8.1f} us, 9 of 10 below {deciles[-1]:8.1f}")


def cut_all(batch: list[Request]) -> None:
    """All tables of a batch that did not run before, as one H200 takes them."""
    split_tables(
        batch,
        len(batch),
        PAGE,
        block_rows=block_rows(GROUP, len(batch)),
        small_rows=SMALL_M // GROUP,
        large_items=PROCESSORS // KV_HEADS,
        small_items=2 * PROCESSORS // KV_HEADS,
        long_item=CONFIGS[block_m(GROUP, len(batch))].long_item,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--changes", type=int, default=4000, help="requests that leave and are followed by another")
    options = parser.parse_args()
    requests, state = Requests(options.documents), random.Random(1)
    plan = LivePlan(slots=options.slots, group=GROUP, kv_heads=KV_HEADS, page_size=PAGE, device=CPU)
    running = [requests.draw() for _ in range(options.slots)]
    for slot, segments in enumerate(running):
        if plan.join(slot, segments):
            raise SystemExit("the batch does not fit the tables")
    plan.upload()
    plan.integrity()
    leaves, joins, uploads = [], [], []
    for _ in range(options.changes):
        slot, segments = state.randrange(options.slots), requests.draw()
        leaves.append(timed(lambda: plan.leave(slot)))  # noqa: B023 - called at once
        joins.append(timed(lambda: plan.join(slot, segments)))  # noqa: B023
        uploads.append(timed(plan.upload))
        running[slot] = segments
    plan.integrity()
    report("leave", leaves)
    report("join", joins)
    report("upload, the host's part", uploads)
    batch = [Request(slice(at, at + 1), tuple(segments)) for at, segments in enumerate(running)]
    report("all tables anew", [timed(lambda: cut_all(batch)) for _ in range(30)])


if __name__ == "__main__":
    main()
