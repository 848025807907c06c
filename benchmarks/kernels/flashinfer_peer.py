"""FlashInfer on the attention benchmark's cases of one row a request, as fair as we know how.

It reads the same memory. Its keys stand rotated at absolute positions, so only requests that begin alike can share
them: those are read request by request (`flat`) or the common beginning once (`cascade`). Chunks that requests share
in any other way take `pieces`: each row is repeated for every chunk that it sees, one paged prefill computes them all,
and a merge follows. The rotation of each repeated row, which that needs, is left out, in FlashInfer's favour.
"""

from collections.abc import Callable, Sequence

import flashinfer
import torch
from torch import Tensor

from braidsdk.kernels.paging import Request

VERSION = flashinfer.__version__

Attend = Callable[[Tensor, Tensor], Tensor]
"""From queries [rows, q_heads, head_dim] and one layer's memory to attention, [rows, q_heads, head_dim]."""

_Prefill = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same, with log-sum-exps to base 2, float32 [rows, q_heads]."""

_WORKSPACE_BYTES = 256 << 20


def ways(requests: Sequence[Request], q_heads: int, kv: Tensor) -> dict[str, Callable[[], Attend]]:
    """What plans each way to compute this, by name; none for requests of several rows.

    Args:
        requests: the last segment of each is its own, and all of it is seen.
        q_heads: query heads.
        kv: one layer's memory, [2, pages, kv_heads, page_size, head_dim].
    """
    if any(request.rows.stop - request.rows.start != 1 for request in requests):
        return {}
    contexts = [[id(segment.pages) for segment in request.segments[:-1]] for request in requests]
    full = all(segment.stop % kv.shape[3] == 0 for segment in requests[0].segments[:-1])
    if not full or any(context != contexts[0] for context in contexts):
        return {"pieces": lambda: _pieces(requests, q_heads, kv)}
    found = {
        "flat": lambda: _flat(requests, q_heads, kv),
        "flat, tensor cores": lambda: _flat_on_tensor_cores(requests, q_heads, kv),
    }
    return found | ({"cascade": lambda: _cascade(requests, q_heads, kv)} if len(requests) > 1 else {})


def _flat(requests: Sequence[Request], q_heads: int, kv: Tensor) -> Attend:
    _, _, kv_heads, page_size, head_dim = kv.shape
    lists = [_pages(request) for request in requests]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(kv), "HND")
    wrapper.plan(
        _starts([len(pages) for pages in lists]),
        torch.cat(lists).int().to(kv.device),
        _last_page([request.segments[-1].stop for request in requests], page_size),
        q_heads,
        kv_heads,
        head_dim,
        page_size,
        q_data_type=kv.dtype,
        kv_data_type=kv.dtype,
    )
    return lambda queries, memory: wrapper.run(queries, (memory[0], memory[1]))


def _flat_on_tensor_cores(requests: Sequence[Request], q_heads: int, kv: Tensor) -> Attend:
    stops = [request.segments[-1].stop for request in requests]
    prefill = _prefill([_pages(request) for request in requests], stops, [1] * len(requests), q_heads, kv)
    return lambda queries, memory: prefill(queries, memory)[0]


def _cascade(requests: Sequence[Request], q_heads: int, kv: Tensor) -> Attend:
    """What FlashInfer's cascade of two levels does, with the kernels (fa2) that are its faster ones here."""
    *shared, _ = requests[0].segments
    own = [request.segments[-1] for request in requests]
    above = _prefill([torch.cat([each.pages for each in shared])], [shared[-1].stop], [len(requests)], q_heads, kv)
    below = _prefill([each.pages for each in own], [each.stop for each in own], [1] * len(own), q_heads, kv)

    def attend(queries: Tensor, memory: Tensor) -> Tensor:
        out, lse = below(queries, memory)
        flashinfer.merge_state_in_place(out, lse, *above(queries, memory))
        return out

    return attend


def _pieces(requests: Sequence[Request], q_heads: int, kv: Tensor) -> Attend:
    """All requests have as many segments."""
    segments = {id(segment.pages): segment for request in requests for segment in request.segments}
    users: dict[int, list[int]] = {name: [] for name in segments}
    for row, request in enumerate(requests):
        for segment in request.segments:
            users[id(segment.pages)].append(row)
    pages, stops = [each.pages for each in segments.values()], [each.stop for each in segments.values()]
    prefill = _prefill(pages, stops, [len(rows) for rows in users.values()], q_heads, kv)
    rows = torch.tensor([row for using in users.values() for row in using])
    repeated, by_row = rows.to(kv.device), rows.argsort(stable=True).view(len(requests), -1).to(kv.device)

    def attend(queries: Tensor, memory: Tensor) -> Tensor:
        outs, lses = prefill(queries[repeated], memory)
        out, _ = flashinfer.merge_states(outs[by_row], lses[by_row])
        return out

    return attend


def _prefill(lists: Sequence[Tensor], stops: Sequence[int], rows: Sequence[int], q_heads: int, kv: Tensor) -> _Prefill:
    """Rows that see all of a list of pages, for several lists.

    Args:
        lists: pages, full ones but for the last of each.
        stops: of the entry that ends each list.
        rows: how many see each list.
        q_heads, kv: as in `ways`.
    """
    _, _, kv_heads, page_size, head_dim = kv.shape
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(kv), "HND", backend="fa2")
    wrapper.plan(
        _starts(rows),
        _starts([len(pages) for pages in lists]),
        torch.cat(list(lists)).int().to(kv.device),
        _last_page(stops, page_size),
        q_heads,
        kv_heads,
        head_dim,
        page_size,
        causal=False,
        q_data_type=kv.dtype,
        kv_data_type=kv.dtype,
    )

    def run(queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(queries)  # else it fills one with zeros first
        lse = torch.empty(queries.shape[:2], dtype=torch.float32, device=queries.device)
        wrapper.run(queries, (memory[0], memory[1]), out=out, lse=lse, return_lse=True)
        return out, lse

    return run


def _pages(request: Request) -> Tensor:
    return torch.cat([segment.pages for segment in request.segments])


def _workspace(kv: Tensor) -> Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=kv.device)


def _starts(sizes: Sequence[int]) -> Tensor:
    """Where each of these begins, and the end: int32 [sizes + 1], on the CPU."""
    return torch.tensor([0, *sizes]).cumsum(0).int()


def _last_page(stops: Sequence[int], page_size: int) -> Tensor:
    """Tokens on each list's last page, int32, on the CPU."""
    return torch.tensor([(stop - 1) % page_size + 1 for stop in stops], dtype=torch.int32)
