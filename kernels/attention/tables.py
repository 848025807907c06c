"""What the GPU reads about a forward pass: which rows see which pages, cut into work for the machine.

Made once per composition on the host. Lengths that grow from token to token are not in it: the kernel reads the rows'
positions, and a segment may end where its reserved pages do.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from braidsdk.kernels.attention.lse import partials_by_segment
from braidsdk.kernels.paging import PagedSegment, Request

_FIELDS = ("items", "spans", "rows", "frames", "pages", "changes", "counts", "merges")


@dataclass(frozen=True)
class Tables:
    """Work of one forward pass; int32, on the CPU until moved.

    An item is a block of rows against some pages; a span is a run of pages of one entry within an item, which has one
    at least.

    Attributes:
        items: [items, 6]: its first row in `rows` (direct: among the batch's rows), how many, first span, one past
            its last span, what is added to the places of its partial results, whether some of its frames have an
            offset in `changes` (read unless `shared`).
        spans: [spans, 4]: where its first page is in `pages`, times the page size, plus the entry's offset (a page
            that entries share is the only one of each); the place at which that page starts; one past the last place;
            f >= 0 if the frames of the item's rows are those from f on, or -1 - f if all share frame f.
        rows: [members, 2]: row of the batch, place of its partial result in an item that adds 0. Empty if direct.
        frames: [frames, 4]: origin, first and one past the last place that may be seen, where in `changes` the
            entry's first word is or -1. Origin, offset and places are those of a `PagedSegment`.
        pages: [pages].
        changes: [words]: of each segment with hidden keys or a shift, what `changes_of` gives. The first word is the
            one behind the shift.
        counts: [4]: the first large item and one past the last, the same of the small ones. One launch walks both
            kinds only where they adjoin.
        merges: [rows, 2]: a row's first partial result, and how many it has; they stand together. Empty if direct.
        shared: the rows of each item are of one request: every span has one frame.
        lone: every item holds one row.
        complete: every row of the batch is in some item.
        most_rows: rows of the largest item.
        by_segment: which partial results are of which segment, from `lse.partials_by_segment`; int64 [rows, segments,
            partials of one]. None unless asked for.
    """

    items: Tensor
    spans: Tensor
    rows: Tensor
    frames: Tensor
    pages: Tensor
    changes: Tensor
    counts: Tensor
    merges: Tensor
    shared: bool
    lone: bool
    complete: bool
    most_rows: int
    by_segment: Tensor | None = None

    @property
    def partials(self) -> int:
        return int(self.merges[:, 1].sum())

    def to(self, device: torch.device) -> "Tables":
        """Moved in one copy."""
        parts = [getattr(self, name) for name in _FIELDS]
        joined = torch.empty(sum(map(torch.numel, parts)), dtype=torch.int32, pin_memory=device.type == "cuda")
        torch.cat([part.view(-1) for part in parts], out=joined)
        moved = torch.split(joined.to(device, non_blocking=True), [part.numel() for part in parts])
        placed: dict[str, Any] = {
            name: new.view(part.shape) for name, new, part in zip(_FIELDS, moved, parts, strict=True)
        }
        if self.by_segment is not None:
            placed["by_segment"] = self.by_segment.to(device)
        return replace(self, **placed)


@dataclass(eq=False)
class _Entry:
    """Pages that belong together, and who uses them once; used again by the same request, they are another entry.

    Attributes:
        pages: their ids.
        offset: where on the first one they belong together, as `PagedSegment.offset`.
        users: indexes of the requests, in order.
        segments: what each of them sees of it.
        places: which of the request's segments that is.
    """

    pages: list[int]
    offset: int
    users: list[int] = field(default_factory=list)
    segments: list[PagedSegment] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def shown(self, page_size: int) -> range:
        """Indexes of the pages that some user sees."""
        first = min([segment.start for segment in self.segments]) // page_size
        return range(first, -(-max([segment.stop for segment in self.segments]) // page_size))


def _entries(requests: Sequence[Request]) -> list[_Entry]:
    """What the requests that have rows see."""
    found: dict[tuple[int, int, int, int], _Entry] = {}
    listed: dict[int, list[int]] = {}  # most requests share the tensors of their pages
    for index, request in enumerate(requests):
        if request.rows.stop <= request.rows.start:
            continue
        times: dict[tuple[int, int, int], int] = {}
        for place, segment in enumerate(request.segments):
            if segment.stop <= segment.start:
                continue
            pages = listed.get(id(segment.pages))
            if pages is None:
                pages = listed[id(segment.pages)] = segment.pages.tolist()
            name = (pages[0], len(pages), segment.offset)  # a place belongs to one entry
            times[name] = again = times.get(name, -1) + 1
            entry = found.get((*name, again))
            if entry is None:
                entry = found[(*name, again)] = _Entry(pages, segment.offset)
            entry.users.append(index)
            entry.segments.append(segment)
            entry.places.append(place)
    return list(found.values())


def direct_tables(requests: Sequence[Request], rows: int, page_size: int, block_rows: int) -> Tables:
    """For many rows: every item holds up to `block_rows` rows of one request and all that they see. Arguments as in
    `split_tables`."""
    builder = _Builder(page_size)
    covered = 0
    for request in requests:
        first_span = builder.spans
        for entry in _entries([request]):
            segment = entry.segments[0]
            frame = builder.frames([(segment, 1)])
            for first, last in seen_pages(segment, page_size):
                stop = min(last * page_size, segment.stop)
                builder.span(entry, max(first * page_size, segment.start), stop, frame, shared=True)
        if builder.spans == first_span:
            continue
        # The last rows see most keys, and so take longest: they begin first.
        for start in reversed(range(request.rows.start, request.rows.stop, block_rows)):
            builder.item(start, min(block_rows, request.rows.stop - start), first_span)
        covered += request.rows.stop - request.rows.start
    nothing = torch.zeros(0, 2, dtype=torch.int32)
    return builder.finish(nothing, nothing, large=builder.items, complete=covered == rows)


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
    by_segment: bool = False,
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
        by_segment: whether every partial result shall be of one segment alone.
    """
    tiles = list(_tiles(requests, page_size, block_rows, by_segment))
    cut: list[tuple[_Tile, int]] = []  # in the order of the items, each tile with the number of its items
    large = 0
    for few, items in ((False, large_items), (True, small_items)):
        some = [tile for tile in tiles if (len(tile.rows) <= small_rows) == few]
        pages = sum([tile.pages for tile in some])
        per_item = max(1, -(-pages // items))
        if per_item >= long_item:
            per_item = -(-pages // (2 * items))
        cut += [(tile, -(-tile.pages // per_item)) for tile in some]
        large = large if few else sum([count for _, count in cut])
    partials = [0] * rows
    for tile, count in cut:
        for row in tile.rows:
            partials[row] += count
    firsts = list(accumulate(partials, initial=0))[:-1]
    free = list(firsts)  # a row's partial results stand together, in the order of the items
    builder = _Builder(page_size)
    members = array("i")
    for tile, count in cut:
        builder.tile(tile, count)
        for row in tile.rows:
            members.extend((row, free[row]))
            free[row] += count
    merges = torch.tensor([firsts, partials], dtype=torch.int32).t().contiguous()
    tables = builder.finish(_tensor(members).view(-1, 2), merges, large=large, complete=all(partials))
    if not by_segment:
        return tables
    seen = [entry for tile, _ in cut for entry, _ in tile.entries]
    places = [
        tile.entries[0][0].places[part.user] for tile, count in cut for _ in range(count) for part in tile.parts
        for _ in part.rows
    ]  # fmt: skip
    most = max([len(requests[user].segments) for entry in seen for user in entry.users], default=0)
    first_row, count_of, _, _, step, _ = tables.items.long().unbind(1)
    before = count_of.cumsum(0) - count_of
    member = torch.arange(len(places)) + (first_row - before).repeat_interleave(count_of)
    row_of, partial = tables.rows.long()[member].unbind(1)
    partial = partial + step.repeat_interleave(count_of)
    groups = partials_by_segment(row_of, torch.tensor(places, dtype=torch.int64), partial, rows, most)
    return replace(tables, by_segment=groups)


_KNOWN = 4096
"""Lists of pages that are remembered; most requests share the tensors of their pages."""

_listed: dict[int, "tuple[Tensor, array[int]]"] = {}


def page_ids(pages: Tensor) -> "array[int]":
    """The ids of an entry's pages, remembered: reading a tensor takes long. The tensor must not change."""
    known = _listed.get(id(pages))  # kept beside its tensor, so that the id stays its own
    if known is None:
        if len(_listed) >= _KNOWN:
            _listed.clear()
        known = _listed[id(pages)] = (pages, array("i", pages.tolist()))
    return known[1]


def seen_pages(segment: PagedSegment, page_size: int) -> list[tuple[int, int]]:
    """Runs of a segment's pages that have a key which is not hidden: the first page's index, and one past the last."""
    first, last = segment.start // page_size, -(-segment.stop // page_size)
    if segment.hidden is None:
        return [(first, last)] if first < last else []
    seen = torch.zeros(last * page_size, dtype=torch.bool)
    seen[segment.start : segment.stop] = ~segment.hidden[segment.start : segment.stop]
    edges = torch.zeros(last + 2, dtype=torch.int8)
    edges[1:-1] = seen.view(last, page_size).any(1)
    ends = edges.diff().nonzero()[:, 0].tolist()
    return list(zip(ends[::2], ends[1::2], strict=True))


_BITS = torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], dtype=torch.int32)
"""Of a word."""


def changes_of(segment: PagedSegment, tokens: int) -> "array[int]":
    """What is added to a segment's keys, and which of them are hidden, for so many tokens of its entry: the slot of its
    shift or -1; then bit i % 32 of word i / 32 is set where key i is hidden."""
    bits = torch.zeros(-(-tokens // 32), 32, dtype=torch.bool)
    if segment.hidden is not None:
        hidden = segment.hidden[:tokens]
        bits.view(-1)[: len(hidden)] = hidden
    words = (bits * _BITS).sum(1, dtype=torch.int32).tolist()
    return array("i", (-1 if segment.shift is None else segment.shift, *words))


class _Part(NamedTuple):
    """Rows of one user of a tile's entries: which of their users it is."""

    user: int
    rows: range


@dataclass(frozen=True)
class _Tile:
    """Rows that are computed together, by user, and the entries that all of them use, with the indexes of the pages."""

    parts: list[_Part]
    entries: list[tuple[_Entry, range]]

    @cached_property
    def rows(self) -> list[int]:
        return [row for part in self.parts for row in part.rows]

    @cached_property
    def pages(self) -> int:
        return sum([len(shown) for _, shown in self.entries])


def _tiles(requests: Sequence[Request], page_size: int, block_rows: int, by_segment: bool) -> Iterator[_Tile]:
    """Rows with the same entries, `block_rows` at a time; `by_segment`: one entry, once, a tile."""
    by_users: dict[tuple[int, ...], list[_Entry]] = {}
    for entry in _entries(requests):
        apart = (len(by_users),) if by_segment else ()
        by_users.setdefault((*entry.users, *apart), []).append(entry)
    for entries in by_users.values():
        shown = [(entry, entry.shown(page_size)) for entry in entries]
        parts, room = [], block_rows
        for user, index in enumerate(entries[0].users):
            rows = range(requests[index].rows.start, requests[index].rows.stop)
            while rows:
                parts.append(_Part(user, rows[:room]))
                rows, room = rows[room:], room - len(parts[-1].rows)
                if not room:
                    yield _Tile(parts, shown)
                    parts, room = [], block_rows
        if parts:
            yield _Tile(parts, shown)


class _Builder:
    """Tables as they grow: flat, as many integers an entry as `Tables` says."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.most_rows = 0
        self.shared = True
        self._items = array("i")
        self._spans = array("i")
        self._frames = array("i")
        self._pages = array("i")
        self._pages_at: dict[tuple[int, int], int] = {}
        self._changes = array("i")
        self._changes_at: dict[tuple[int, int | None, int], int] = {}
        self._members = 0

    @property
    def items(self) -> int:
        return len(self._items) // 6

    @property
    def spans(self) -> int:
        return len(self._spans) // 4

    def tile(self, tile: _Tile, count: int) -> None:
        """A tile's pages in `count` equal parts, an item each."""
        alone, rows = len(tile.parts) == 1, len(tile.rows)
        at, done, first_span = 0, 0, self.spans
        changed = any(entry.segments[part.user].changed for entry, _ in tile.entries for part in tile.parts)
        for entry, shown in tile.entries:
            frames = self.frames([(entry.segments[user], 1 if alone else len(rows)) for user, rows in tile.parts])
            page, last = shown.start, shown.stop
            while page < last:
                end = (done + 1) * tile.pages // count
                taken = min(last - page, end - at)
                self.span(entry, page * self.page_size, (page + taken) * self.page_size, frames, shared=alone)
                page, at = page + taken, at + taken
                if at == end:
                    self.item(self._members, rows, first_span, done, changed=changed)
                    done, first_span = done + 1, self.spans
        self._members += rows

    def item(self, first_row: int, rows: int, first_span: int, step: int = 0, *, changed: bool = False) -> None:
        """An item over the spans from `first_span` on, `step` added to the places of its partial results."""
        self._items.extend((first_row, rows, first_span, self.spans, step, changed))
        self.most_rows = max(self.most_rows, rows)

    def frames(self, of: Sequence[tuple[PagedSegment, int]]) -> int:
        """A frame for each of these segments, so many times; where they start."""
        at = len(self._frames) // 4
        for segment, times in of:
            change = self._change(segment) if segment.changed else -1
            self._frames.extend((segment.origin, segment.start, segment.stop, change) * times)
        return at

    def span(self, entry: _Entry, start: int, stop: int, frames: int, *, shared: bool) -> None:
        """The pages that hold the places [start, stop) of an entry; a frame for each of an item's rows, or one that
        they share."""
        first = start // self.page_size
        name = (entry.pages[0], len(entry.pages))
        pages_at = self._pages_at.get(name)
        if pages_at is None:
            pages_at = self._pages_at[name] = len(self._pages)
            self._pages.extend(entry.pages)
        listed = (pages_at + first) * self.page_size + entry.offset
        self._spans.extend((listed, first * self.page_size, stop, -1 - frames if shared else frames))
        self.shared &= shared

    def finish(self, rows: Tensor, merges: Tensor, *, large: int, complete: bool) -> Tables:
        return Tables(
            items=_tensor(self._items).view(-1, 6),
            spans=_tensor(self._spans).view(-1, 4),
            rows=rows,
            frames=_tensor(self._frames).view(-1, 4),
            pages=_tensor(self._pages),
            changes=_tensor(self._changes),
            counts=torch.tensor((0, large, large, self.items), dtype=torch.int32),
            merges=merges,
            shared=self.shared,
            lone=self.most_rows <= 1,
            complete=complete,
            most_rows=self.most_rows,
        )

    def _change(self, segment: PagedSegment) -> int:
        """Where the first word of a segment's bitmap is in the table."""
        tokens = len(segment.pages) * self.page_size
        name = (id(segment.hidden), segment.shift, tokens)
        at = self._changes_at.get(name)
        if at is None:
            at = self._changes_at[name] = len(self._changes) + 1
            self._changes.extend(changes_of(segment, tokens))
        return at


def _tensor(values: "array[int]") -> Tensor:
    return torch.frombuffer(values, dtype=torch.int32) if values else torch.zeros(0, dtype=torch.int32)
