"""Which ids stand around the texts of a chat template's prompts, so that ids of pieces join to the ids of the whole.

A tokenizer may treat a piece otherwise than the same text within a prompt. A SentencePiece-style one puts a space
before a piece, and most join a space with the word after it. So a piece is encoded in one of three ways. Which one is
right is found by what the tokenizer gives for whole prompts.

Knows nothing about messages.
"""

import re
from collections.abc import Callable, Sequence
from itertools import product

from braidsdk.prompt.tokenizer import TextTokenizer

Ids = tuple[int, ...]
Encode = Callable[[str], Ids]
"""A way to encode a piece."""

_JOINED = re.compile("[\n\u010a][^\\s\u010a\u010d\u0109\u0120\u2581]")
"""A token of a newline and what follows it, but for white space. Byte-level tokenizers write a newline as U+010A."""


def ways(tokenizer: TextTokenizer) -> tuple[Encode, ...]:
    """The ways to encode a piece: as it is, as after a newline, and as after a newline and a space. The space is then
    the piece's own. Only the first is there if the tokenizer joins a newline with what follows."""
    newline = tokenizer.plain("\n")
    joins = tokenizer.has_plain(_JOINED)

    def inside(text: str) -> Ids:
        return tokenizer.plain(f"\n{text}")[len(newline) :]

    def spaced(text: str) -> Ids:
        return inside(f" {text}")

    return (tokenizer.plain,) if joins else (tokenizer.plain, inside, spaced)


def closed(encoders: Sequence[Encode], after: str) -> tuple[Encode, ...]:
    """These ways, and the same with the white space that stands after the piece: it may be one token with the end of
    the text. Then it is the piece's own.

    Args:
        encoders: ways to encode a piece.
        after: what the template puts after it.
    """
    space = after[: len(after) - len(after.lstrip())]

    def closing(encode: Encode) -> Encode:
        return lambda text: encode(f"{text}{space}")

    return (*encoders, *map(closing, encoders)) if space else tuple(encoders)


def around(wholes: Sequence[Ids], pieces: Sequence[Sequence[Ids]]) -> tuple[Ids, ...] | None:
    """The ids before, between and after pieces that are the same in several prompts. None if there are no such ids.

    Args:
        wholes: ids of the prompts.
        pieces: ids of each prompt's pieces, in order.
    """
    found: list[Ids] = []
    rests = list(wholes)
    for column in zip(*pieces, strict=True):
        place = _place(rests, column)
        if place is None:
            return None
        found.append(rests[0][:place])
        rests = [rest[place + len(piece) :] for rest, piece in zip(rests, column, strict=True)]
    return (*found, rests[0]) if len(set(rests)) == 1 else None


def fit(
    wholes: Sequence[Ids],
    choices: Sequence[Sequence[Encode]],
    pieces: Callable[[Sequence[Encode]], Sequence[Sequence[Ids]]],
) -> tuple[tuple[Encode, ...], tuple[Ids, ...]] | None:
    """The first choice of ways with which pieces fit into prompts, and the ids around the pieces. None if none fits.

    Args:
        wholes: ids of the prompts.
        choices: the ways that each kind of piece may be encoded, the preferred first.
        pieces: the ids of each prompt's pieces for one way per kind.
    """
    for chosen in product(*choices):
        ids = around(wholes, pieces(chosen))
        if ids is not None:
            return chosen, ids
    return None


def _place(rests: Sequence[Ids], column: Sequence[Ids]) -> int | None:
    """Where each piece stands in its prompt, after the same ids in all. The last such place, if there are several."""
    common = 0
    for ids in zip(*rests, strict=False):
        if len(set(ids)) > 1:
            break
        common += 1
    for place in range(common, -1, -1):
        if all(rest[place : place + len(piece)] == piece for rest, piece in zip(rests, column, strict=True)):
            return place
    return None
