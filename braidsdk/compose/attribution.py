"""Turns shares of segments into shares of documents."""

from collections.abc import Sequence

from braidsdk.compose.composition import Composition
from braidsdk.types import LEVEL_SYSTEM, Chunk, Source, TokenSources


def sources(
    composition: Composition, shares: Sequence[Sequence[float]], texts: Sequence[str]
) -> tuple[tuple[Source, ...], tuple[TokenSources, ...]]:
    """Rank the documents of a composition by the attention that an answer gave them.

    Documents are all chunks but the system prompt that stands first. A chunk that stands twice counts once, with both
    shares.

    Args:
        composition: what was asked.
        shares: of each token, the share of attention that each segment got.
        texts: of each token, the text that it completed.
    """
    columns: dict[Chunk, list[int]] = {}
    for place, segment in enumerate(composition.segments):
        if segment.chunk and not (place == 0 and segment.chunk.level == LEVEL_SYSTEM):
            columns.setdefault(segment.chunk, []).append(place)
    weights = [[sum(row[place] for place in places) for places in columns.values()] for row in shares]
    together = _parts([sum(column) for column in zip(*weights, strict=True)])
    order = sorted(range(len(together)), key=lambda column: -together[column])
    documents = list(columns)
    return (
        tuple(Source(documents[column], together[column]) for column in order),
        tuple(
            TokenSources(text, tuple(parts[column] for column in order))
            for text, parts in zip(texts, map(_parts, weights), strict=True)
        ),
    )


def _parts(weights: Sequence[float]) -> list[float]:
    """Weights as parts of their sum."""
    total = sum(weights) or 1.0
    return [weight / total for weight in weights]
