"""What the GPU reads about a forward pass: which rows see which pages, cut into work for the machine.

Made once per composition on the host. Lengths that grow from token to token are not in it: the kernel reads the rows'
positions, and a segment may end where its reserved pages do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from braidsdk.kernels.paging import PagedSegment, Request

_FIELDS = ("items", "spans", "rows", "frames", "pages", "hidden", "counts", "merges")


@dataclass(frozen=True)
class Tables:
    """Work of one forward pass; int32, on the CPU until moved.

    An item is a block of rows against some pages; a span is a run of pages of one entry within an item.

    Attributes:
        items: [items, 4]: its first row in `rows` (direct: among the batch's rows), how many, first span, one past
            its last span.
        spans: [spans, 4]: its first page in `pages`, the entry's token at which that page starts, one past the last
            token, f >= 0 if the frames of the item's rows are those from f on, or -1 - f if all share frame f.
        rows: [members, 2]: row of the batch, place of its partial result. Empty if direct.
        frames: [frames, 4]: origin, first and one past the last token that may be seen, offset in `hidden` of the
            entry's first word or -1.
        pages: [pages].
        hidden: [words]: bit i % 32 of word i / 32 is set where an entry's key i is hidden.
        counts: [3]: zero, how many items are large, how many there are; the large ones come first.
        merges: [rows + 1]: a row's partial results are those from merges[row] to merges[row + 1].
        shared: the rows of each item are of one request: every span has one frame.
        lone: every item holds one row.
        complete: every row of the batch is in some item.
        most_rows: rows of the largest item.
    """

    items: Tensor
    spans: Tensor
    rows: Tensor
    frames: Tensor
    pages: Tensor
    hidden: Tensor
    counts: Tensor
    merges: Tensor
    shared: bool
    lone: bool
    complete: bool
    most_rows: int

    @property
    def partials(self) -> int:
        return int(self.merges[-1])

    def to(self, device: torch.device) -> "Tables":
        """Moved in one copy."""
        parts = [getattr(self, name) for name in _FIELDS]
        joined = torch.cat([part.flatten() for part in parts])
        if device.type == "cuda":
            joined = joined.pin_memory()
        moved = torch.split(joined.to(device, non_blocking=True), [part.numel() for part in parts])
        placed: dict[str, Any] = {
            name: new.view(part.shape) for name, new, part in zip(_FIELDS, moved, parts, strict=True)
        }
        return replace(self, **placed)


_Entry = tuple[int, int]
"""First page and number of pages: they name an entry, since a page belongs to one."""


@dataclass(frozen=True)
class _Use:
    """A segment of a request: which of the entry's tokens its rows may see, and where; and the entry's pages."""

    rows: range
    segment: PagedSegment
    pages: list[int]

    @cached_property
    def entry(self) -> _Entry:
        return self.pages[0], len(self.pages)


def direct_tables(requests: Sequence[Request], rows: int, page_size: int, block_rows: int) -> Tables:
    """For many rows: every item holds up to `block_rows` rows of one request and all that they see. Arguments as in
    `split_tables`."""
    builder = _Builder(page_size)
    for request in requests:
        uses = _uses(request)
        if not uses:
            continue
        first_span = len(builder.spans)
        for use in uses:
            builder.span(use.segment.start, use.segment.stop, [use], len(use.rows))
        for start in range(request.rows.start, request.rows.stop, block_rows):
            builder.items.append((start, min(block_rows, request.rows.stop - start), first_span, len(builder.spans)))
    builder.ends += [len(builder.items)] * 2
    covered = sum(item[1] for item in builder.items)
    nothing = torch.zeros(1, dtype=torch.int64)
    return builder.finish(nothing[:0].view(0, 2), nothing, complete=covered == rows)


def split_tables(
    requests: Sequence[Request],
    rows: int,
    page_size: int,
    *,
    block_rows: int,
    small_rows: int,
    large_items: int,
    small_items: int,
    long_item: int,
) -> Tables:
    """For few rows: pages that several requests use are read for them all, and work is cut for the whole machine.

    Entries with the same users are walked by the same items, `block_rows` rows at a time.

    Args:
        requests: rows and segments; their rows do not overlap.
        rows: how many the batch has.
        page_size: tokens per page.
        block_rows: rows of one item at most.
        small_rows: rows of an item that goes to the kernel for few of them.
        large_items, small_items: how many keep the machine busy: the work is cut into about as many, more if it is in
            small pieces.
        long_item: pages of an item from which on there are twice as many.
    """
    tiles = list(_tiles(requests, page_size, block_rows))
    large = [tile for tile in tiles if len(tile.rows) > small_rows]
    small = [tile for tile in tiles if len(tile.rows) <= small_rows]
    builder = _Builder(page_size)
    item_rows: list[Tensor] = []
    members = 0
    for some, items in ((large, large_items), (small, small_items)):
        pages = sum(tile.pages for tile in some)
        per_item = max(1, -(-pages // items))
        if per_item >= long_item:
            per_item = -(-pages // (2 * items))
        for tile in some:
            tile_rows = torch.tensor(tile.rows)
            for cut in tile.cuts(-(-tile.pages // per_item)):
                first_span = len(builder.spans)
                for shown, uses in cut:
                    builder.span(shown.start * page_size, shown.stop * page_size, uses, len(tile_rows))
                builder.items.append((members, len(tile_rows), first_span, len(builder.spans)))
                item_rows.append(tile_rows)
                members += len(tile_rows)
        builder.ends.append(len(builder.items))
    members_rows = torch.cat(item_rows) if item_rows else torch.zeros(0, dtype=torch.int64)
    counts = torch.bincount(members_rows, minlength=rows)
    places = torch.empty_like(members_rows)
    places[members_rows.argsort(stable=True)] = torch.arange(members)  # a row's partial results stand together
    return builder.finish(
        torch.stack((members_rows, places), 1),
        torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))),
        complete=bool((counts > 0).all()),
    )


def _uses(request: Request) -> list[_Use]:
    """A request's segments that are not empty; none if it has no rows."""
    rows = range(request.rows.start, request.rows.stop)
    return [_Use(rows, each, each.pages.tolist()) for each in request.segments if rows and each.stop > each.start]


@dataclass(frozen=True)
class _Tile:
    """Rows that are computed together, and the entries that all of them use: the uses of each, and the indexes of its
    pages that some of them see."""

    rows: list[int]
    entries: list[tuple[list[_Use], range]]

    @cached_property
    def pages(self) -> int:
        return sum(len(shown) for _, shown in self.entries)

    def cuts(self, count: int) -> Iterator[list[tuple[range, list[_Use]]]]:
        """Its pages in `count` equal parts; of each part, by entry: the pages' indexes, and who uses them."""
        ends = iter([(cut + 1) * self.pages // count for cut in range(count)])
        end, at = next(ends), 0
        found: list[tuple[range, list[_Use]]] = []
        for uses, shown in self.entries:
            while shown:
                taken, shown = shown[: end - at], shown[end - at :]
                found.append((taken, uses))
                at += len(taken)
                if at == end:
                    yield found
                    found, end = [], next(ends, self.pages)


def _tiles(requests: Sequence[Request], page_size: int, block_rows: int) -> Iterator[_Tile]:
    """Rows with the same entries, `block_rows` at a time."""
    users: dict[tuple[_Entry, int], list[_Use]] = {}
    for request in requests:
        times: dict[_Entry, int] = {}
        for use in _uses(request):
            times[use.entry] = again = times.get(use.entry, -1) + 1
            users.setdefault((use.entry, again), []).append(use)
    by_users: dict[tuple[int, ...], list[list[_Use]]] = {}
    for uses in users.values():
        by_users.setdefault(tuple(use.rows.start for use in uses), []).append(uses)
    for entries in by_users.values():
        rows = [row for use in entries[0] for row in use.rows]
        for start in range(0, len(rows), block_rows):
            stop = start + block_rows
            cut = entries if len(rows) <= block_rows else [_cut(uses, start, stop) for uses in entries]
            shown = [(uses, _pages_of(uses, page_size)) for uses in cut]
            yield _Tile(rows[start : start + block_rows], shown)


def _cut(uses: Sequence[_Use], start: int, stop: int) -> list[_Use]:
    """The uses by rows [start, stop) of all their rows."""
    cut, at = [], 0
    for use in uses:
        if rows := use.rows[max(start - at, 0) : max(stop - at, 0)]:
            cut.append(_Use(rows, use.segment, use.pages))
        at += len(use.rows)
    return cut


def _pages_of(uses: Sequence[_Use], page_size: int) -> range:
    """Indexes of an entry's pages that some user sees."""
    first = min(use.segment.start for use in uses) // page_size
    return range(first, -(-max(use.segment.stop for use in uses) // page_size))


class _Builder:
    """Tables as they grow."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.items: list[tuple[int, int, int, int]] = []
        self.spans: list[tuple[int, int, int, int]] = []
        self.ends = [0]
        self._frames: list[tuple[int, int, int, int]] = []
        self._pages: list[int] = []
        self._pages_at: dict[_Entry, int] = {}
        self._hidden: list[Tensor] = []
        self._hidden_at: dict[int, int] = {}
        self._words = 0

    def span(self, start: int, stop: int, uses: Sequence[_Use], members: int) -> None:
        """The pages that hold the tokens [start, stop) of an entry; a frame for each of an item's `members` rows, or
        one frame if all are of the same user."""
        first = start // self.page_size
        at = len(self._frames)
        alone = len(uses[0].rows) == members
        pages_at = self._page_list(uses[0])
        self.spans.append((pages_at + first, first * self.page_size, stop, -1 - at if alone else at))
        for use in uses:
            each = use.segment
            self._frames += [(each.origin, each.start, each.stop, self._bits(each))] * (1 if alone else len(use.rows))

    def finish(self, rows: Tensor, merges: Tensor, *, complete: bool) -> Tables:
        def table(values: Sequence[object], width: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).view(-1, width)

        most = max((item[1] for item in self.items), default=0)
        return Tables(
            items=table(self.items, 4),
            spans=table(self.spans, 4),
            rows=rows.to(torch.int32),
            frames=table(self._frames, 4),
            pages=torch.tensor(self._pages, dtype=torch.int32),
            hidden=torch.cat(self._hidden) if self._hidden else torch.zeros(0, dtype=torch.int32),
            counts=torch.tensor(self.ends, dtype=torch.int32),
            merges=merges.to(torch.int32),
            shared=all(span[3] < 0 for span in self.spans),
            lone=most <= 1,
            complete=complete,
            most_rows=most,
        )

    def _page_list(self, use: _Use) -> int:
        """Where an entry's pages start in the table."""
        if use.entry not in self._pages_at:
            self._pages_at[use.entry] = len(self._pages)
            self._pages += use.pages
        return self._pages_at[use.entry]

    def _bits(self, segment: PagedSegment) -> int:
        """Where a segment's bitmap starts in the table, or -1."""
        if segment.hidden is None:
            return -1
        if id(segment.hidden) not in self._hidden_at:
            bits = torch.zeros(-(-len(segment.pages) * self.page_size // 32), 32, dtype=torch.int64)
            bits.view(-1)[: len(segment.hidden)] = segment.hidden.to(torch.int64)
            words = (bits << torch.arange(32)).sum(1)
            self._hidden.append(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32))
            self._hidden_at[id(segment.hidden)] = self._words
            self._words += len(words)
        return self._hidden_at[id(segment.hidden)]
