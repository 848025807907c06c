"""Tokens of a composition that are computed again for one request, with sight of everything before them.

They are computed in a frame of their own that begins where the prompt begins, on scratch pages as long as the context:
so a key's position is its index, and what was not chosen is hidden. The entries that they come from are not written to:
what was chosen is hidden in them. After the first token only what was chosen is kept, on the overlay's pages, one token
behind the other. Every row that comes later sees all of it, and keys stay rotated by their positions, so that no frame
but the prompt's is needed.

An overlay that is kept is put back onto scratch pages, so that the first token reads the same memory as without.

For the engine's thread, which is in inference mode.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from braidsdk.cache.pool import Pool
from braidsdk.compose.composition import Composition
from braidsdk.compose.repairs import (
    SHRINKING,
    Blended,
    Guided,
    Linked,
    Random,
    first_tokens,
    most_tokens,
    random_tokens,
    repairable,
)
from braidsdk.engine.attribution import layers_of
from braidsdk.engine.batch import Run, make_batch
from braidsdk.kernels.paging import PagedSegment, Shift, slots_of
from braidsdk.kernels.rope import rotate
from braidsdk.models.base import Model

_MOVED_AT_ONCE = 1 << 14
"""Tokens whose keys are compared together; bounds what memory that takes."""

_COPIED_AT_ONCE = 1 << 11
"""Tokens whose keys and values are copied together, likewise."""


@dataclass(frozen=True)
class Chosen:
    """Which tokens a rule chooses.

    Attributes:
        positions: their absolute positions, ascending.
        work: what choosing them took, in tokens times layers.
    """

    positions: list[int]
    work: int


@dataclass(frozen=True)
class Repaired:
    """What a request computes again.

    Attributes:
        positions: absolute positions of the tokens, ascending, int64 [tokens], on the CPU.
        context: the segments of the entries, with these tokens hidden.
        run: computes them.
        scratch: what `run` fills, as a segment.
        overlay: pages of what is kept of it.
    """

    positions: Tensor
    context: tuple[PagedSegment, ...]
    run: Run
    scratch: PagedSegment
    overlay: Tensor

    @property
    def settled(self) -> tuple[PagedSegment, ...]:
        """What later rows see of the context.

        The segment of these tokens begins at position 0 and has fewer tokens than precede the first row that sees it,
        so that row, and every one after it, sees all of them.
        """
        return (*self.context, PagedSegment(self.overlay, 0, len(self.positions), 0))


def choose(
    model: Model,
    pool: Pool,
    composition: Composition,
    context: Sequence[PagedSegment],
    pages: Tensor,
    scratch: Tensor,
    step_tokens: int,
) -> Chosen:
    """Choose by the composition's rule.

    Args:
        model, pool: what computes.
        composition: it has a rule, and a tail.
        context: its segments at their places, all of them computed.
        pages: pages of its tail, which is computed there for rules that ask what it attends to.
        scratch: pages for all tokens of the context.
        step_tokens: tokens that one pass computes at most.
    """
    pool.blank(scratch)  # hidden keys are multiplied by zero, so whatever lies there must be finite
    return Chosen(*_chosen(model, pool, composition, context, pages, scratch, step_tokens))


def repaired(
    pool: Pool,
    composition: Composition,
    context: Sequence[PagedSegment],
    chosen: Sequence[int],
    scratch: Tensor,
    overlay: Tensor,
) -> Repaired:
    """Lay out what computes the chosen tokens again.

    Args:
        pool, composition, context, scratch: see `choose`.
        chosen: positions that it chose, at least one.
        overlay: pages for what is chosen, and for shifts behind it.
    """
    positions = torch.tensor(chosen, dtype=torch.int64)
    hidden = torch.zeros(composition.tail_origin, dtype=torch.bool)
    hidden[positions] = True
    ends = [*(segment.origin for segment in context), composition.tail_origin]
    bounds = torch.searchsorted(positions, torch.tensor(ends)).tolist()
    changed = [at for at in range(len(context)) if bounds[at + 1] > bounds[at]]
    hiding = list(context)
    for at in changed:
        chosen_there = pad(hidden[ends[at] : ends[at + 1]], (context[at].offset, 0))  # by place
        hiding[at] = replace(context[at], hidden=chosen_there)
    shifts: tuple[Shift, ...] = ()
    if composition.repair and composition.repair.shift:
        counts = [bounds[at + 1] - bounds[at] for at in changed]
        shifts = _shifts(pool, [context[at] for at in changed], counts, positions, scratch, overlay)
        for at, shift in zip(changed, shifts, strict=True):
            hiding[at] = replace(hiding[at], shift=shift.target)
    unchosen = ~hidden
    own = PagedSegment(scratch, 0, composition.tail_origin, 0, unchosen)
    ids = composition.input_ids
    run = Run(tuple([ids[at] for at in chosen]), tuple(hiding), scratch, 0, 0, positions, unchosen, shifts)
    return Repaired(positions, tuple(hiding), run, own, overlay)


def settle(pool: Pool, repair: Repaired) -> None:
    """Keep what was computed again on the overlay's pages, without what is between."""
    _copy(pool, (repair.scratch.pages, repair.positions), (repair.overlay, torch.arange(len(repair.positions))))


def put_back(pool: Pool, repair: Repaired) -> None:
    """Copy an overlay to where it was computed: the opposite of `settle`."""
    _copy(pool, (repair.overlay, torch.arange(len(repair.positions))), (repair.scratch.pages, repair.positions))


def _copy(pool: Pool, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """Copy keys and values of tokens, given by pages and their indices there, in all layers at once."""
    layers, _, pages, heads, size, head_dim = pool.kv.shape
    slots = torch.stack([slots_of(*each, size) for each in (source, target)]).to(pool.kv.device)
    outer, head = (torch.arange(count, device=pool.kv.device) for count in (2 * layers, heads))
    flat = pool.kv.view(-1, head_dim)
    for part in slots.split(_COPIED_AT_ONCE, 1):
        page, offset = part[:, None, :, None] // size, part[:, None, :, None] % size
        taken, put = ((((outer[:, None, None] * pages + page) * heads + head) * size) + offset).flatten(1)
        flat.index_copy_(0, put, flat.index_select(0, taken))


def apart(
    repair: Repaired, composition: Composition, context: Sequence[PagedSegment]
) -> tuple[tuple[PagedSegment, ...], tuple[int, ...]]:
    """What later rows see, as `settled` has it, with the overlay cut by the segments that its tokens are of; and which
    these are."""
    *entries, overlay = context
    parts, owners = [], []
    for index, segment in enumerate(composition.segments):
        ends = torch.tensor([segment.origin, segment.origin + len(segment.token_ids)])
        start, stop = torch.searchsorted(repair.positions, ends).tolist()
        if stop > start:
            parts.append(replace(overlay, start=start, stop=stop))
            owners.append(index)
    return (*entries, *parts), tuple(owners)


def _shifts(
    pool: Pool,
    segments: Sequence[PagedSegment],
    counts: Sequence[int],
    positions: Tensor,
    scratch: Tensor,
    overlay: Tensor,
) -> tuple[Shift, ...]:
    """How these segments' tokens, so many of each at these positions, move in the mean, into slots behind them."""
    size = pool.page_size
    pages = torch.cat([segment.pages for segment in segments])
    before = accumulate((len(segment.pages) * size for segment in segments[:-1]), initial=0)
    firsts = zip(before, segments, strict=True)
    places = torch.tensor([at + segment.offset - segment.origin for at, segment in firsts])  # on `pages`
    stored = slots_of(pages, positions + places.repeat_interleave(torch.tensor(counts)), size).split(list(counts))
    fresh = slots_of(scratch, positions, size).split(list(counts))
    behind = torch.arange(len(positions), len(positions) + len(segments))
    return tuple(
        Shift(new, old, target, segment.origin, count / (count + SHRINKING))
        for new, old, target, segment, count in zip(
            fresh, stored, slots_of(overlay, behind, size).tolist(), segments, counts, strict=True
        )
    )


def _chosen(
    model: Model,
    pool: Pool,
    composition: Composition,
    context: Sequence[PagedSegment],
    pages: Tensor,
    scratch: Tensor,
    step_tokens: int,
) -> tuple[list[int], int]:
    """Absolute positions of the tokens that the rule chooses, ascending; and what choosing took, in tokens times
    layers."""
    rule, places = composition.repair, repairable(composition)
    match rule:
        case Linked(k):
            return first_tokens(composition, k), 0
        case Random():
            return random_tokens(composition), 0
        case Guided(layers=several, near=near):
            run = Run(composition.tail, tuple(context), pages, 0, composition.tail_origin)
            layers = several or layers_of(model.config.layers)
            found = model.attended(make_batch([run], pool), pool.kv, layers)
            sizes = [len(composition.segments[place].token_ids) for place in places]
            scores = widened(torch.cat([found[place] for place in places]), sizes, near or 0)
            return highest(composition, scores), len(composition.tail) * (max(layers) + 1)
        case Blended(layer=layer):
            run = _all_tokens(composition, context, scratch)
            for piece in _pieces(run, step_tokens):
                model.fill(make_batch([piece], pool), pool.kv, layer)
            scores = _moved(model, pool, composition, context, scratch, layer)
            return highest(composition, scores), len(run.token_ids) * (layer + 1)
    raise RuntimeError(f"no repair {rule!r}")


def highest(composition: Composition, scores: Tensor) -> list[int]:
    """What `ranked` chooses, on the scores' device.

    Args:
        composition: it has a rule.
        scores: of all repairable segments' tokens, one segment behind the other, [tokens].
    """
    segments = [composition.segments[index] for index in repairable(composition)]
    positions = torch.cat([torch.arange(each.origin, each.origin + len(each.token_ids)) for each in segments])
    order = scores.sort(descending=True, stable=True).indices
    best = order[: most_tokens(composition)].sort().values.cpu()
    found: list[int] = positions[best].tolist()
    return found


def widened(scores: Tensor, sizes: Sequence[int], near: int) -> Tensor:
    """For each token the highest score among those of its segment at most so many tokens away, less by the distance.

    Args:
        scores: of the segments' tokens, none negative, one segment behind the other, [tokens].
        sizes: tokens of each segment.
        near: how far away, in tokens.

    Returns:
        [tokens].
    """
    if not near:
        return scores
    # Nothing is nearer to another segment than so many zeros. `places` is where each token's neighbourhood begins.
    segment = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    places = (torch.arange(len(segment)) + segment * near).to(scores.device)
    padded = scores.new_zeros(len(segment) + (len(sizes) + 1) * near)
    padded[places + near] = scores
    weights = 1 - torch.arange(-near, near + 1, device=scores.device).abs() / (near + 1)
    return (padded.unfold(0, 2 * near + 1, 1) * weights).amax(1)[places]


def _all_tokens(composition: Composition, context: Sequence[PagedSegment], scratch: Tensor) -> Run:
    """All tokens behind the first segment, as a full prefill computes them."""
    start = len(composition.segments[0].token_ids)
    ids = tuple(chain.from_iterable(segment.token_ids for segment in composition.segments[1:]))
    own = torch.zeros(composition.tail_origin, dtype=torch.bool)
    own[:start] = True
    places = torch.arange(start, start + len(ids))
    return Run(ids, (context[0],), scratch, 0, 0, places, own)


def _pieces(run: Run, tokens: int) -> Iterator[Run]:
    rest: Run | None = run
    while rest:
        piece, rest = rest.cut(tokens)
        yield piece


def _moved(
    model: Model,
    pool: Pool,
    composition: Composition,
    context: Sequence[PagedSegment],
    scratch: Tensor,
    layer: int,
) -> Tensor:
    """By how much each repairable token's key moved at a layer: the squared distance from the entry's key, turned to
    where the token stands, to the one that was computed behind everything before it, [tokens]."""
    size, columns = pool.page_size, []
    for place in repairable(composition):
        segment, tokens = context[place], torch.arange(len(composition.segments[place].token_ids))
        fresh = slots_of(scratch, tokens + segment.origin, size)
        stored = slots_of(segment.pages, tokens + segment.offset, size)
        columns.append(torch.stack((fresh, stored, torch.full_like(tokens, segment.origin))))
    found = []
    for part in torch.cat(columns, 1).to(pool.kv.device).split(_MOVED_AT_ONCE, 1):
        after, before = (pool.kv[layer, 0, slots // size, :, slots % size] for slots in part[:2])
        cos, sin = model.rotary.at(part[2], composition.tail_origin)
        turned = rotate(before.to(cos.dtype), cos, sin) / model.rotary.attention_factor
        found.append((turned - after.to(cos.dtype)).square().sum((1, 2)))
    return torch.cat(found)
