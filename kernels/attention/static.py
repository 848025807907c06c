"""Attention of questions, or of one decoding row, in captured graphs: planned for each replay.

The host's time counts here, so work is cut simply: every item is of one request, and what several requests use is read
for each. All tables are one array, and reach the device in one copy.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor

from braidsdk.kernels.attention.launch import CONFIGS, Launch, TritonPlan, block_m, block_rows, work_items
from braidsdk.kernels.attention.tables import Tables, changes_of, page_ids, seen_pages
from braidsdk.kernels.launch import counters
from braidsdk.kernels.paging import Request


@dataclass(frozen=True)
class Room:
    """How much the tables may hold that a captured graph reads.

    Attributes:
        items: work items.
        words: integers of frames, pages, changes and spans.
        partials: partial results of all rows.
    """

    items: int = 1024
    words: int = 1 << 15
    partials: int = 4096

    def beyond(self, needed: "Room") -> "Room | None":
        """Twice what is needed of what is too small; None if all fits."""
        sizes = [(most, more) for most, more in zip(vars(self).values(), vars(needed).values(), strict=True)]
        if all(more <= most for most, more in sizes):
            return None
        return Room(*(most if more <= most else 2 * more for most, more in sizes))


def changed(requests: Sequence[Request]) -> bool:
    """Whether requests see keys that are not all as they are stored."""
    return any(segment.changed for request in requests for segment in request.segments)


class StaticPlan:
    """A plan whose tables stay where they are, for a captured graph; what is in them may change between replays."""

    def __init__(
        self,
        *,
        rows: int,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        group: int,
        kv_heads: int,
        page_size: int,
        room: Room,
        changes: bool = True,
    ) -> None:
        """Args:
        rows: of the batch; without requests they attend to nothing.
        positions: absolute position of each row, int64 [rows]; read when the graph runs.
        cos, sin: of every position up to the largest, float32 [positions, head_dim / 2].
        group: query heads per KV head.
        kv_heads: KV heads.
        page_size: tokens per page.
        room: what the tables may hold.
        changes: whether keys may be hidden or shifted; a graph of none is faster.
        """
        self._page_size, self._room, self._changes = page_size, room, changes
        device, size = positions.device, block_m(group, rows)
        self._block_rows = block_rows(group, rows)
        self._work_items, self._long_item = work_items(device, kv_heads, size), CONFIGS[size].long_item
        # Each table begins where 16 bytes do, as kernels assume.
        self._merges_at = 4
        self._rows_at = self._merges_at + -(-rows // 2) * 4
        self._items_at = self._rows_at + -(-rows // 2) * 4
        self._words_at = self._items_at + -(-room.items * 6 // 4) * 4
        self._rows = rows
        self._device = torch.zeros(self._words_at + -(-room.words // 4) * 4, dtype=torch.int32, device=device)
        words = self._device[self._words_at :]
        tables = Tables(
            items=self._device[self._items_at :][: room.items * 6].view(-1, 6),
            spans=words.view(-1, 4),
            rows=self._device[self._rows_at :][: rows * 2].view(-1, 2),
            frames=words.view(-1, 4),
            pages=words,
            changes=words,
            counts=self._device[:4],
            merges=self._device[self._merges_at :][: rows * 2].view(-1, 2),
            shared=True,
            lone=rows == 1,
            complete=True,
            most_rows=rows,
        )
        launch = Launch(
            block_m=size,
            programs=2 * work_items(device, kv_heads, size) * kv_heads,
            small_programs=0,
            partials=room.partials,
            direct=False,
            shared=True,
            merges=rows == 1,
            hides=changes,
            shifts=changes,
        )
        self.plan = TritonPlan(tables, launch, positions, cos, sin, counters("attention", device, rows * kv_heads))

    def load(self, requests: Sequence[Request]) -> Room | None:
        """Plan for these requests; None, or the room that they need if they do not fit.

        Raises:
            ValueError: some keys are hidden or shifted, in a plan of none.
        """
        if not self._changes and changed(requests):
            raise ValueError("expected keys as they are stored; make the plan with changes=True")
        host = self._tables(requests)
        if isinstance(host, Room):
            return host
        source = torch.frombuffer(host, dtype=torch.int32)
        if self._device.is_cuda:
            source = source.pin_memory()
        self._device[: len(host)].copy_(source, non_blocking=True)
        return None

    def _tables(self, requests: Sequence[Request]) -> "array[int] | Room":
        """`tables.Tables` as one array, or the room that it needs. The words hold frames, pages, changes and spans,
        each counted from the first word in entries of its own width."""
        size, most = self._page_size, self._block_rows
        asked, words_of_pages, frame_count, total = [], 0, 0, 0
        changes = array("i")
        for request in requests:
            shown, pages = [], 0
            for segment in request.segments:
                if runs := seen_pages(segment, size):
                    shown.append((segment, page_ids(segment.pages), runs, len(changes) + 1))
                    if segment.changed:
                        changes.extend(changes_of(segment, -(-segment.stop // size) * size))
                    pages += sum([last - first for first, last in runs])
            start, stop = request.rows.start, request.rows.stop
            if pages and stop > start:
                asked.append((start, stop, shown, pages))
                words_of_pages += sum([len(ids) for _, ids, _, _ in shown])
                frame_count += len(shown)
                total += pages * -(-(stop - start) // most)
        per_item = max(1, -(-total // self._work_items))
        if per_item >= self._long_item:
            per_item = -(-total // (2 * self._work_items))
        frames, listed, spans, items, members = (array("i") for _ in range(5))
        merges = array("i", bytes(8 * self._rows))
        pages_at = 4 * frame_count
        changes_at = pages_at + words_of_pages
        span = (changes_at + len(changes) + 3) // 4
        partial = 0
        for start, stop, shown, pages in asked:
            count = -(-pages // per_item)
            first_span, done, at, end = span, 0, 0, pages // count
            ends = []  # of each item, the span behind its last
            for segment, ids, runs, change in shown:
                frame, listed_at = -1 - len(frames) // 4, pages_at + len(listed)
                change = changes_at + change if segment.changed else -1
                frames.extend((segment.origin, segment.start, segment.stop, change))
                listed.extend(ids)
                for page, last in runs:
                    while page < last:
                        taken = min(last - page, end - at)
                        listed_page = (listed_at + page) * size + segment.offset
                        spans.extend((listed_page, page * size, (page + taken) * size, frame))
                        page, at, span = page + taken, at + taken, span + 1
                        if at == end:
                            ends.append(span)
                            done += 1
                            end = (done + 1) * pages // count
            firsts = range(partial, partial + count * (stop - start), count)
            partial += count * (stop - start)
            for member in range(len(members) // 2, len(members) // 2 + stop - start, most):
                some, begin = min(most, len(members) // 2 + stop - start - member), first_span
                for step, behind in enumerate(ends):
                    items.extend((member, some, begin, behind, step, 0))  # the rows of an item share its frames
                    begin = behind
            members.extend(chain.from_iterable(zip(range(start, stop), firsts, strict=True)))
            merges[2 * start : 2 * stop] = array("i", chain.from_iterable(zip(firsts, repeat(count))))
        item_count = len(items) // 6
        needed = Room(item_count, 4 * span, partial)
        if wanted := self._room.beyond(needed):
            return wanted
        host = array("i", (0, item_count, item_count, item_count))
        for part, behind in ((merges, self._rows_at), (members, self._items_at), (items, self._words_at)):
            host.extend(part)
            host.frombytes(bytes(4 * (behind - len(host))))
        host.extend(frames)
        host.extend(listed)
        host.extend(changes)
        host.frombytes(bytes(-4 * len(host) % 16))  # the words begin where 16 bytes do
        host.extend(spans)
        return host
