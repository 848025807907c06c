"""What all layers of a forward pass share about attention: the plan that each backend makes, and what torch's plans
begin with, a request's pages, rotations and visibility.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from braidsdk.kernels.backends import Backend
from braidsdk.kernels.paging import Request
from braidsdk.kernels.rope import RotaryTable


class Plan(Protocol):
    """A pass as one backend runs it."""

    @property
    def backend(self) -> Backend:
        """Whose it is."""
        ...

    def attend(self, queries: Tensor, kv: Tensor, scale: float) -> Tensor:
        """What `reference.cascade_attention_reference` computes; arguments and result as there."""
        ...

    def attend_with_lse(self, queries: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What `reference.cascade_attention_lse_reference` computes; arguments and results as there.

        Raises:
            ValueError: the plan was not made with `by_segment=True`.
        """
        ...

    def bytes_read(self, kv: Tensor) -> int:
        """Bytes of paged memory that one layer reads: its segments' pages, as often as they are read."""
        ...


def needs_segments() -> ValueError:
    """What a plan raises that can't give the log-sum-exp of each segment."""
    return ValueError("cascade_attention_lse: expected a plan made with by_segment=True; plan the pass again.")


def page_bytes(kv: Tensor) -> int:
    """Bytes of one page of a layer's memory, keys and values."""
    return 2 * kv[0, 0].numel() * kv.element_size()


@dataclass(frozen=True)
class RequestPlan:
    """One request, its segments laid out page after page.

    Attributes:
        rows: the request's place among the batch's tokens.
        pages: pages of all segments, int64 [pages].
        spans: tokens that each segment takes once its pages are laid out, whole pages each; empty ones are left out.
        places: which of the request's segments each of these is.
        segments: how many the request has, the empty ones counted.
        cos, sin: rotation of each row's query in each segment's frame, [rows, segments, head_dim / 2].
        hidden: what a row must not see: keys after it, keys outside their segment's slice, padding;
            bool [rows, pages * page_size].
        outside: keys outside their segment's slice, which may hold anything, NaN too; bool [pages * page_size].
        shifts: slot of each segment's shift, None where it has none.
    """

    rows: slice
    pages: Tensor
    spans: tuple[int, ...]
    places: tuple[int, ...]
    segments: int
    cos: Tensor
    sin: Tensor
    hidden: Tensor
    outside: Tensor
    shifts: tuple[int | None, ...]

    def shifted(self, keys: Tensor, values: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all segments with their shifts added.

        Args:
            keys, values: [heads, tokens, head_dim], the heads a multiple of the memory's KV heads.
            kv: the layer's paged memory.
        """
        if not any(slot is not None for slot in self.shifts):
            return keys, values
        found = []
        for each, memory in zip((keys, values), kv, strict=True):
            parts = []
            for slot, part in zip(self.shifts, each.split(list(self.spans), 1), strict=True):
                if slot is not None:
                    added = memory[slot // kv.shape[3], :, slot % kv.shape[3]].to(part.dtype)
                    part = part + added.repeat_interleave(len(part) // len(added), 0)[:, None]
                parts.append(part)
            found.append(torch.cat(parts, 1))
        return found[0], found[1]


def plan_request(
    positions: Tensor, request: Request, rotary: RotaryTable, limit: int, page_size: int
) -> RequestPlan | None:
    """Lay out one request; None if it has no rows or sees no token. Arguments as in `op.plan_attention`."""
    places = tuple(at for at, segment in enumerate(request.segments) if segment.stop > segment.start)
    segments = [request.segments[at] for at in places]
    if not segments or request.rows.stop <= request.rows.start:
        return None
    rows = positions[request.rows]
    pages, keys_at, spans, outside = [], [], [], []
    never = torch.iinfo(torch.int64).max  # the position of what no row sees
    for segment in segments:
        first, last = segment.start // page_size, -(-segment.stop // page_size)
        pages.append(segment.pages[first:last])
        spans.append((last - first) * page_size)
        place = torch.arange(first * page_size, last * page_size, device=rows.device)
        inside = (place >= segment.start) & (place < segment.stop)
        outside.append(~inside)
        if segment.hidden is not None:
            stop = min(len(segment.hidden), segment.stop)
            inside[: max(stop - first * page_size, 0)] &= ~segment.hidden[first * page_size : stop].to(rows.device)
        keys_at.append(torch.where(inside, place + (segment.origin - segment.offset), never))
    origins = torch.tensor([segment.origin for segment in segments], device=rows.device)
    # A row before a segment's frame sees none of its keys, so any rotation will do.
    cos, sin = rotary.at((rows[:, None] - origins).clamp(min=0), limit)
    hidden = torch.cat(keys_at) > rows[:, None]
    return RequestPlan(
        request.rows,
        torch.cat(pages).to(rows.device),
        tuple(spans),
        places,
        len(request.segments),
        cos,
        sin,
        hidden,
        torch.cat(outside),
        tuple(segment.shift for segment in segments),
    )
