"""Whether a text is of the invented world that braid-tiny knows, and the warning if not.

In that world every word that is no name comes from a few fixed phrases, and every name is one or two capitalised words.
So the rule is: of the words that are no names, most must be words of these phrases. Ordinary prose shares its commonest
words with them and no more.
"""

import re
import warnings
from collections.abc import Iterable
from functools import cache
from itertools import islice

from braidsdk.models.tiny.phrases import fixed_phrases

KNOWN_SHARE = 2 / 3
"""Of a text's words without names, at least so many are the world's. In its own texts all are; in a thousand
paragraphs of software's documentation it was 0.46 in the median, and in one of thirty as much as this."""

_LOOKED_AT = 2_000  # characters of a text: enough to tell
_TEXTS = 500  # of one call: a larger collection is rarely of the world in its first ones only

_WORD = re.compile(r"[^\W_]+")


class OutsideWorldWarning(UserWarning):
    """braid-tiny was given texts outside the invented world that it answers questions about."""


def is_of_the_world(text: str) -> bool:
    """Whether a text's words, without its names, are mostly those of braid-tiny's world; of no words it is true."""
    known = _vocabulary()
    words = [word for word in _WORD.findall(text[:_LOOKED_AT]) if word.lower() in known or not _is_name(word)]
    return sum(word.lower() in known for word in words) >= KNOWN_SHARE * len(words)


def warn_once(texts: Iterable[str]) -> None:
    """Warn, once per process, if one of the texts, the first ones of many, is outside braid-tiny's world."""
    global _warned
    if _warned or all(map(is_of_the_world, islice(texts, _TEXTS))):
        return
    _warned = True
    warnings.warn(
        "braid-tiny answers questions about its own invented world only, and these texts are not of it: expect wrong "
        "answers. It is there to try things out. For texts of your own open a real model, such as "
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
