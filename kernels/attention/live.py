"""Attention of a running batch in captured graphs: requests join and leave between replays.

`live_tables.py` keeps the tables on the host; here they meet the device, in one copy a change.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from braidsdk.kernels.attention.launch import SMALL_M, Launch, TritonPlan, block_m, block_rows, work_items
from braidsdk.kernels.attention.live_tables import LiveRoom, LiveTables
from braidsdk.kernels.attention.tables import Tables
from braidsdk.kernels.launch import counters
from braidsdk.kernels.paging import PagedSegment

ITEM_PAGES = 8
"""Pages of one item at most: those of a chunk of 512 tokens."""


class LivePlan:
    """Tables for the decoding rows of a running batch. A row is a slot that a request keeps from its first token to
    its last; graphs of any number of rows read the same tables.

    `join` and `leave` change the host's copy; `upload` brings the device's up to date, in stream order. A graph may be
    replayed if it has at least `rows` rows; those without a request give zeros.
    """

    def __init__(
        self,
        *,
        slots: int,
        group: int,
        kv_heads: int,
        page_size: int,
        device: torch.device,
        room: LiveRoom | None = None,
        item_pages: int = ITEM_PAGES,
    ) -> None:
        """Args:
        slots: rows of the largest graph.
        group: query heads per KV head.
        kv_heads: KV heads.
        page_size: tokens per page.
        device: where graphs run.
        room: what the tables may hold.
        item_pages: pages of one item at most; those of a longer entry are cut into equal parts.
        """
        self._group, self._kv_heads, self._most_rows = group, kv_heads, block_rows(group, slots)
        self._tables = LiveTables(
            slots=slots,
            most_rows=self._most_rows,
            small_rows=min(self._most_rows, SMALL_M // group),
            page_size=page_size,
            item_pages=item_pages,
            room=room or LiveRoom(),
        )
        self._host = torch.frombuffer(self._tables.host, dtype=torch.int32)
        self._device = torch.zeros_like(self._host, device=device)
        self._changed = True

    @property
    def changes(self) -> bool:
        """Whether a request sees keys that are hidden or shifted: what a graph must have been planned with then."""
        return self._tables.changes

    @property
    def rows(self) -> int:
        """What a graph must have at least: one past the last occupied slot."""
        return self._tables.rows

    def plan(self, positions: Tensor, cos: Tensor, sin: Tensor, *, changes: bool = True) -> TritonPlan:
        """What a graph of as many rows as there are positions is captured with.

        Args:
            positions: absolute position of each row, int64 [rows]; read when the graph runs.
            cos, sin: of every position up to the largest, float32 [positions, head_dim / 2].
            changes: whether keys may be hidden or shifted; a graph of none is faster.

        Raises:
            ValueError: there are more rows than slots.
        """
        rows, kv_heads, device, placed = len(positions), self._kv_heads, self._device.device, self._tables
        if rows > placed.slots:
            raise ValueError(f"expected at most {placed.slots} rows, one per slot; got {rows}.")
        words = self._device[placed.words_at :]
        tables = Tables(
            items=self._device[placed.items_at :][: placed.room.items * 6].view(-1, 6),
            spans=words.view(-1, 4),
            rows=words.view(-1, 2),
            frames=words.view(-1, 4),
            pages=words,
            changes=words,
            counts=self._device[:4],
            merges=self._device[4:][: rows * 2].view(-1, 2),
            shared=False,
            lone=False,
            complete=True,
            most_rows=min(rows, self._most_rows),
        )
        size = block_m(self._group, rows)  # the rows of an item are different slots of the graph's, so they fit
        few = work_items(device, kv_heads, SMALL_M)
        launch = Launch(
            block_m=size,
            programs=4 * work_items(device, kv_heads, size) * kv_heads if size > SMALL_M else 0,
            small_programs=(4 * few if size > SMALL_M else 2 * few) * kv_heads,
            partials=rows * placed.room.partials,
            direct=False,
            shared=False,
            merges=False,
            hides=changes,
            shifts=changes,
        )
        return TritonPlan(tables, launch, positions, cos, sin, counters("attention", device, rows * kv_heads))

    def join(self, slot: int, segments: Sequence[PagedSegment]) -> LiveRoom | None:
        """A request takes a free slot.

        Args:
            slot: below `slots`.
            segments: all that its row may see, its own tail included as far as pages are reserved for it. Their
                tensors of pages must not change.

        Returns:
            None, or the room that a new plan needs where it does not fit this one; then nothing has changed.

        Raises:
            ValueError: the slot is not free.
        """
        wanted = self._tables.join(slot, segments)
        self._changed |= wanted is None
        return wanted

    def leave(self, slot: int) -> None:
        """A request gives its slot back. Graphs read its pages until the next `upload`.

        Raises:
            ValueError: no request has it.
        """
        self._tables.leave(slot)
        self._changed = True

    def upload(self) -> None:
        """Bring the device's tables up to date, on the current stream. Does not wait for the device."""
        if not self._changed:
            return
        used = self._tables.used
        source = self._host[:used]
        if self._device.device.type == "cuda":
            source = source.pin_memory()  # new memory, which torch uses again once the copy is done, not before
        self._device[:used].copy_(source, non_blocking=True)
        self._changed = False

    def blank(self) -> None:
        """Let the device's tables hold no work, until the next `upload`: a pass of any number of rows may run then."""
        self._device[:4] = 0  # the counts of items
        self._changed = True

    def integrity(self) -> None:
        """Check the host's tables: requests see their segments once each and in order, no memory has two users.

        Raises:
            RuntimeError: something is wrong; the tables must not be used.
        """
        self._tables.integrity()
