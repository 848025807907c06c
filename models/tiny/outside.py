"""Finds out whether a text belongs to the invented world that braid-tiny knows, and warns if it does not.

In that world every name is one or two capitalised words, and all other words come from a few fixed phrases. So the rule
is: most words that are not names must be words of these phrases. Ordinary prose shares only its most common words with
them.
"""

import re
import warnings
from collections.abc import Iterable
from functools import cache
from itertools import islice

from braidsdk.models.tiny.phrases import fixed_phrases

KNOWN_SHARE = 2 / 3
"""At least this share of a text's words, without names, must be the world's. In the world's own texts all words are. In
a thousand paragraphs of software documentation the median was 0.46, and one in thirty had as much as this."""

_LOOKED_AT = 2_000  # this many characters of a text are enough to tell
_TEXTS = 500  # texts of one call that are checked; the others are rarely different

_WORD = re.compile(r"[^\W_]+")


class OutsideWorldWarning(UserWarning):
    """braid-tiny was given texts outside the invented world that it answers questions about."""


def is_of_the_world(text: str) -> bool:
    """Whether most of a text's words, without its names, belong to braid-tiny's world. True for a text without
    words."""
    known = _vocabulary()
    words = [word for word in _WORD.findall(text[:_LOOKED_AT]) if word.lower() in known or not _is_name(word)]
    return sum(word.lower() in known for word in words) >= KNOWN_SHARE * len(words)


def warn_once(texts: Iterable[str]) -> None:
    """Warn, once per process, if one of the first texts is outside braid-tiny's world."""
    global _warned
    if _warned or all(map(is_of_the_world, islice(texts, _TEXTS))):
        return
    _warned = True
    warnings.warn(
        "braid-tiny answers questions about its own invented world only, and these texts are not about it: expect "
        "wrong answers. It is there to try things out. For your own texts open a real model, such as "
        "Braid('Qwen/Qwen3-0.6B').",
        OutsideWorldWarning,
        stacklevel=4,
    )


_warned = False


def _is_name(word: str) -> bool:
    return word[0].isupper() and word[1:].islower()


@cache
def _vocabulary() -> frozenset[str]:
    phrases = " ".join(phrase.replace("{", " {").replace("}", "} ") for phrase in fixed_phrases())
    return frozenset(word.lower() for word in _WORD.findall(re.sub(r"\{.\}", " ", phrases)))
