"""The tables of a running batch, on the host: a request that joins or leaves changes what is its own, in microseconds.

`tables.split_tables` cuts all work anew, evenly for the machine, in milliseconds where requests are many. Here an entry
is cut in the same way whoever uses it: a join adds a member to the items of its entries, or makes them. Hence a
request's partial results, and the order in which they are merged, do not depend on the others.

Hidden keys and shifts are a request's own, and what it sees is not. So a request that has some takes one block of words
for them when it joins, and gives it back when it leaves: `tables.changes_of` each of its segments that has, one behind
the other. Its frames say where; its entries are still read once for all who use them. An item counts its members with
such a frame, so that the kernel looks at one number where there are none.
"""

import struct
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import le

from braidsdk.kernels.attention.tables import changes_of, page_ids
from braidsdk.kernels.paging import PagedSegment

_ITEM, _SPAN, _MEMBER, _FRAME = (struct.Struct(f"{width}i") for width in (6, 4, 2, 4))


@dataclass(frozen=True)
class LiveRoom:
    """How much the tables of a running batch may hold.

    Attributes:
        items: work items.
        words: integers of spans, pages, members, frames and changes.
        partials: partial results of one request, one for each item that it is in.
    """

    items: int = 1024
    words: int = 1 << 17
    partials: int = 64


_LEAST_CHANGES = 64
"""Words of the smallest block of a request's changes; others are a power of two, so that the next one fits."""

_Name = tuple[int, int, int, int, int, int]
"""Pages that belong together: the first one's id, how many the entry has and its offset there, which of them are seen,
from and to, and how often the same request has used them before."""


class _Tile:
    """Slots that are computed together, as many as an item takes at most, and the items of the pages that they see.

    Attributes:
        name: of its pages.
        slots: in the order of its members.
        changed: how many of these see hidden keys or a shift.
        few_at, most_at: where in the words its blocks are, for few members, and for the most; -1 where there is none.
            One that is large keeps the block for few, so that a request can leave however full the tables are.
        large: whether the block for the most holds its members, and its items are the large launch's.
        frames, rows: where in the words its members' frames and rows are.
        spans: where in the words each of its items has its span and pages.
        items: where in the table each of them is.
    """

    __slots__ = ("changed", "few_at", "frames", "items", "large", "most_at", "name", "rows", "slots", "spans")

    def __init__(self, name: _Name) -> None:
        self.name = name
        self.slots: list[int] = []
        self.few_at = self.most_at = self.frames = self.rows = -1
        self.large = False
        self.changed = 0
        self.spans: list[int] = []
        self.items: list[int] = []


@dataclass(frozen=True)
class _Running:
    """A request of the batch: what it sees, the tiles that it is in, and the block of its changes, where and its
    size."""

    segments: tuple[PagedSegment, ...]
    tiles: list[_Tile]
    changes: tuple[int, int]


class _Heap:
    """Blocks of words, in few sizes; one that is given back serves its size again.

    Attributes:
        top: one past the last word that was ever taken.
    """

    def __init__(self) -> None:
        self.top = 0
        self._free: dict[int, list[int]] = defaultdict(list)

    def lacking(self, *blocks: tuple[int, int]) -> int:
        """Words beyond the top that blocks take: sizes, and how many of each."""
        counts: dict[int, int] = defaultdict(int)
        for size, count in blocks:
            counts[size] += count
        return sum([size * max(0, count - len(self._free[size])) for size, count in counts.items()])

    def take(self, size: int) -> int:
        if free := self._free[size]:
            return free.pop()
        self.top += size
        return self.top - size

    def give(self, at: int, size: int) -> None:
        self._free[size].append(at)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Those that are free: where, and their size."""
        return ((at, size) for size, free in self._free.items() for at in free)

    def clear(self) -> None:
        """All of them are given back: begin again from the start."""
        self.top = 0
        self._free.clear()


class LiveTables:
    """What `tables.Tables` says of a batch whose rows are slots, one request each, in one array of integers.

    Attributes:
        host: counts [4], merges [slots, 2], items [items, 6], words; each begins where 16 bytes do, as kernels assume.
            Large items stand at the start of the items, small ones at their end. The words hold spans, pages, rows,
            frames and changes, each counted from the first word in entries of its own width.
        items_at, words_at: where in `host` items and words begin.
    """

    def __init__(
        self, *, slots: int, most_rows: int, small_rows: int, page_size: int, item_pages: int, room: LiveRoom
    ) -> None:
        """Args:
        slots: rows of the batch at most.
        most_rows: of one item.
        small_rows: of an item that goes to the kernel for few of them; at most `most_rows`, 0 if none does.
        page_size: tokens per page.
        item_pages: of one item at most; those of a longer entry are cut into equal parts.
        room: what the tables may hold.
        """
        self.slots, self.room = slots, room
        self._page_size, self._item_pages = page_size, item_pages
        self._few, self._most = small_rows, most_rows
        self.items_at = 4 + -(-slots // 2) * 4
        self.words_at = self.items_at + -(-room.items * 6 // 4) * 4
        self.host = array("i", bytes(4 * (self.words_at + -(-room.words // 4) * 4)))
        # What blocks take, in whole frames: an item's span and pages; frames and rows of few or of most members.
        self._span_size = -(-(4 + item_pages) // 4) * 4
        self._few_size, self._most_size = (-(-6 * rows // 4) * 4 for rows in (small_rows, most_rows))
        self._heap = _Heap()
        self._running: dict[int, _Running] = {}
        self._tiles: dict[_Name, list[_Tile]] = {}
        self._small: list[tuple[_Tile, int]] = []  # whose the items are, and which of its: from the end backwards
        self._large: list[tuple[_Tile, int]] = []  # from the start
        self._count()

    @property
    def used(self) -> int:
        """Integers of `host` that say something; what stands behind them is free."""
        return self.words_at + self._heap.top

    @property
    def changes(self) -> bool:
        """Whether some request's keys are hidden or shifted."""
        return any(each.changes[1] for each in self._running.values())

    @property
    def rows(self) -> int:
        """One past the last occupied slot."""
        return max(self._running, default=-1) + 1

    def join(self, slot: int, segments: Sequence[PagedSegment]) -> LiveRoom | None:
        """As `LivePlan.join`."""
        if not 0 <= slot < self.slots or slot in self._running:
            raise ValueError(f"expected a free slot below {self.slots}, got {slot}.")
        named: dict[_Name, PagedSegment] = {}
        changes: dict[_Name, array[int]] = {}
        items = 0
        for segment in segments:
            if segment.stop <= segment.start:
                continue
            pages = page_ids(segment.pages)
            first, last = segment.start // self._page_size, -(-segment.stop // self._page_size)
            name = (pages[0], len(pages), segment.offset, first, last, 0)  # a place belongs to one entry
            while name in named:
                name = (*name[:5], name[5] + 1)
            named[name] = segment
            if segment.changed:
                changes[name] = changes_of(segment, last * self._page_size)
            items += -(-(last - first) // self._item_pages)
        size = sum(map(len, changes.values()))
        size = size and max(_LEAST_CHANGES, 1 << (size - 1).bit_length())
        if wanted := self._wanted(items, len(named), size):
            return wanted
        at = block = self._heap.take(size) if size else 0
        place = slot * self.room.partials
        tiles = []
        for name, segment in named.items():
            change = -1
            if words := changes.get(name):
                self.host[self.words_at + at : self.words_at + at + len(words)] = words
                change, at = at + 1, at + len(words)
            tile = self._open_tile(name, segment)
            self._add(tile, slot, place, segment, change)
            place += len(tile.items)
            tiles.append(tile)
        self._running[slot] = _Running(tuple(named.values()), tiles, (block, size))
        _MEMBER.pack_into(self.host, 16 + 8 * slot, slot * self.room.partials, items)
        self._count()
        return None

    def leave(self, slot: int) -> None:
        """As `LivePlan.leave`."""
        if slot not in self._running:
            raise ValueError(f"expected an occupied slot, got {slot}.")
        gone = self._running.pop(slot)
        for tile in gone.tiles:
            self._remove(tile, slot)
        if gone.changes[1]:
            self._heap.give(*gone.changes)
        if not self._running:
            self._heap.clear()
        self.host[5 + 2 * slot] = 0
        self._count()

    def integrity(self) -> None:
        """As `LivePlan.integrity`."""
        partials = self._partials()
        for slot in range(self.slots):
            found = sorted(partials.pop(slot, []))
            first, count = _MEMBER.unpack_from(self.host, 16 + 8 * slot)
            if [place for place, _ in found] != list(range(first, first + count)):
                raise RuntimeError(f"slot {slot}: its items do not leave partial results 0 to {count - 1}.")
            if found and not slot * self.room.partials <= first <= (slot + 1) * self.room.partials - count:
                raise RuntimeError(f"slot {slot}: its {count} partial results lie outside its room.")
            segments = self._running[slot].segments if slot in self._running else ()
            if list(chain.from_iterable([seen for _, seen in found])) != list(_keys(segments, self._page_size)):
                raise RuntimeError(f"slot {slot}: what its items see is not its {len(segments)} segments.")
        if partials:
            raise RuntimeError(f"items are for slots {sorted(partials)} of {self.slots}.")
        tiles = [tile for some in self._tiles.values() for tile in some]
        taken = [(tile.few_at, self._few_size) for tile in tiles if self._few]
        taken += [(tile.most_at, self._most_size) for tile in tiles if tile.most_at >= 0]
        taken += [(span, self._span_size) for tile in tiles for span in tile.spans]
        taken += [each.changes for each in self._running.values() if each.changes[1]]
        end = 0
        for at, size in sorted(chain(taken, self._heap.blocks())):
            if at != end:
                raise RuntimeError(f"words {min(at, end)} to {max(at, end)}: used twice, or lost.")
            end = at + size
        if end != self._heap.top:
            raise RuntimeError(f"words {end} to {self._heap.top}: used twice, or lost.")
        if end > self.room.words or len(self._small) + len(self._large) > self.room.items:
            raise RuntimeError(f"{end} words and {len(self._small) + len(self._large)} items do not fit {self.room}.")

    def _partials(self) -> dict[int, list[tuple[int, list[tuple[object, ...]]]]]:
        """What the host's tables say: by slot, the places of partial results, each with the keys that it is of."""
        found = defaultdict(list)
        start, large, small, stop = _SPAN.unpack_from(self.host, 0)
        rows = {False: range(1, self._few + 1), True: range(self._few + 1, self._most + 1)}
        for item in chain(range(start, large), range(small, stop)):
            first_row, count, span, last_span, step, some = _ITEM.unpack_from(self.host, 4 * (self.items_at + 6 * item))
            listed, token, end, frame = self._read(_SPAN, 4 * span)
            if count not in rows[item < large] or last_span != span + 1:
                raise RuntimeError(f"item {item}: of {count} rows and {last_span - span} spans.")
            size = self._page_size
            pages = self.host[self.words_at + listed // size :][: (end - token) // size]
            for member in range(count):
                slot, place = self._read(_MEMBER, 2 * (first_row + member))
                *seen, change = self._read(_FRAME, 4 * (frame + member))
                some -= change >= 0
                changes = self.host[self.words_at + change - 1 :] if change >= 0 else None
                tokens = range(token, end, size)
                keys = [
                    (*seen, listed % size, at, page, _changes(changes, at, size))
                    for at, page in zip(tokens, pages, strict=True)
                ]
                found[slot].append((place + step, keys))
            if some:
                raise RuntimeError(f"item {item}: {some} rows more than have hidden keys or a shift.")
        return found

    def _read(self, kind: struct.Struct, at: int) -> tuple[int, ...]:
        return kind.unpack_from(self.host, 4 * (self.words_at + at))

    def _wanted(self, items: int, segments: int, changes: int) -> LiveRoom | None:
        """Twice what the tables would take where they do not fit, if all of a request's segments are new and large."""
        words = self._heap.lacking(
            (self._span_size, items), (self._few_size, segments), (self._most_size, segments), (changes, 1)
        )
        needed = (len(self._small) + len(self._large) + items, self._heap.top + words, items)
        sizes = (self.room.items, self.room.words, self.room.partials)
        if all(map(le, needed, sizes)):
            return None
        return LiveRoom(*[size if need <= size else 2 * need for need, size in zip(needed, sizes, strict=True)])

    def _open_tile(self, name: _Name, segment: PagedSegment) -> _Tile:
        """The fullest tile of an entry that has a member free, so that others run empty; or a new one."""
        tiles = self._tiles.setdefault(name, [])
        best = None
        for tile in tiles:
            if len(tile.slots) < self._most and (best is None or len(tile.slots) > len(best.slots)):
                best = tile
        if best is not None:
            return best
        tile = _Tile(name)
        if self._few:
            tile.few_at = self._heap.take(self._few_size)
        self._settle(tile, large=not self._few)
        tiles.append(tile)
        pages, first, shown = page_ids(segment.pages), name[3], name[4] - name[3]
        count = -(-shown // self._item_pages)
        tile.items = [0] * count
        tile.spans = [self._heap.take(self._span_size) for _ in range(count)]
        start, size = first, self._page_size
        for step, span in enumerate(tile.spans):
            stop, at = first + (step + 1) * shown // count, self.words_at + span
            listed = (span + 4) * size + segment.offset
            _SPAN.pack_into(self.host, 4 * at, listed, start * size, stop * size, tile.frames // 4)
            self.host[at + 4 : at + 4 + stop - start] = pages[start:stop]
            start = stop
        self._place(tile)
        return tile

    def _add(self, tile: _Tile, slot: int, place: int, segment: PagedSegment, change: int) -> None:
        member = len(tile.slots)
        if member == self._few and not tile.large:
            self._move(tile, large=True)
        frame = self.words_at + tile.frames + 4 * member
        row = self.words_at + tile.rows + 2 * member
        _FRAME.pack_into(self.host, 4 * frame, segment.origin, segment.start, segment.stop, change)
        _MEMBER.pack_into(self.host, 4 * row, slot, place)
        tile.slots.append(slot)
        tile.changed += change >= 0
        self._recount(tile)

    def _remove(self, tile: _Tile, slot: int) -> None:
        """The last member takes the place of the one that leaves."""
        member, last = tile.slots.index(slot), len(tile.slots) - 1
        moved = tile.slots.pop()
        if not last:
            self._drop(tile)
            return
        host, frames, rows = self.host, self.words_at + tile.frames, self.words_at + tile.rows
        tile.changed -= host[frames + 4 * member + 3] >= 0
        if member != last:
            tile.slots[member] = moved
            host[frames + 4 * member : frames + 4 * member + 4] = host[frames + 4 * last : frames + 4 * last + 4]
            host[rows + 2 * member : rows + 2 * member + 2] = host[rows + 2 * last : rows + 2 * last + 2]
        if last == self._few:
            self._move(tile, large=False)
        self._recount(tile)

    def _move(self, tile: _Tile, *, large: bool) -> None:
        """A tile's members to the other one of its blocks, and its items to the other launch."""
        host, base, count = self.host, self.words_at, len(tile.slots)
        frames = host[base + tile.frames : base + tile.frames + 4 * count]
        rows = host[base + tile.rows : base + tile.rows + 2 * count]
        self._displace(tile)
        self._settle(tile, large=large)
        host[base + tile.frames : base + tile.frames + 4 * count] = frames
        host[base + tile.rows : base + tile.rows + 2 * count] = rows
        for span in tile.spans:
            host[base + span + 3] = tile.frames // 4
        self._place(tile)

    def _settle(self, tile: _Tile, *, large: bool) -> None:
        """Choose the block that holds a tile's members."""
        tile.large = large
        if large:
            tile.frames = tile.most_at = self._heap.take(self._most_size)
        else:
            tile.frames = tile.few_at
            if tile.most_at >= 0:
                self._heap.give(tile.most_at, self._most_size)
                tile.most_at = -1
        tile.rows = tile.frames + 4 * (self._most if large else self._few)

    def _drop(self, tile: _Tile) -> None:
        self._displace(tile)
        for span in tile.spans:
            self._heap.give(span, self._span_size)
        if self._few:
            self._heap.give(tile.few_at, self._few_size)
        if tile.most_at >= 0:
            self._heap.give(tile.most_at, self._most_size)
        tiles = self._tiles[tile.name]
        tiles.remove(tile)
        if not tiles:
            del self._tiles[tile.name]

    def _place(self, tile: _Tile) -> None:
        """Put a tile's items into the table, at the end that its size belongs to."""
        owners = self._large if tile.large else self._small
        for step, span in enumerate(tile.spans):
            tile.items[step] = item = len(owners) if tile.large else self.room.items - 1 - len(owners)
            owners.append((tile, step))
            at = 4 * (self.items_at + 6 * item)
            _ITEM.pack_into(self.host, at, tile.rows // 2, len(tile.slots), span // 4, span // 4 + 1, step, 0)

    def _displace(self, tile: _Tile) -> None:
        """Take a tile's items out of the table; the last ones there take their places."""
        owners, host = self._large if tile.large else self._small, self.host
        for step in range(len(tile.items)):
            item = tile.items[step]  # read anew: it may have taken the place of one before
            other, its = owners.pop()
            last = other.items[its]
            if last != item:
                owners[item if tile.large else self.room.items - 1 - item] = (other, its)
                other.items[its] = item
                to, source = self.items_at + 6 * item, self.items_at + 6 * last
                host[to : to + 6] = host[source : source + 6]

    def _recount(self, tile: _Tile) -> None:
        """Tell a tile's items how many members it has, and how many of them are changed."""
        count = len(tile.slots)
        for item in tile.items:
            at = self.items_at + 6 * item
            self.host[at + 1], self.host[at + 5] = count, tile.changed

    def _count(self) -> None:
        """Where large items end, and small ones begin."""
        _SPAN.pack_into(self.host, 0, 0, len(self._large), self.room.items - len(self._small), self.room.items)


def _keys(segments: Sequence[PagedSegment], size: int) -> Iterator[tuple[object, ...]]:
    """Origin, bounds and offset, first place, id and changes of each page, of what a request sees."""
    for segment in segments:
        pages, last = segment.pages.tolist(), -(-segment.stop // size)
        changes = changes_of(segment, last * size) if segment.changed else None
        for page in range(segment.start // size, last):
            seen = segment.origin, segment.start, segment.stop, segment.offset
            yield *seen, page * size, pages[page], _changes(changes, page * size, size)


def _changes(changes: "array[int] | None", token: int, size: int) -> tuple[int, ...]:
    """Of what `tables.changes_of` gives, the shift and the words of one page."""
    return (changes[0], *changes[1 + token // 32 : 1 - (token + size) // -32]) if changes else ()
