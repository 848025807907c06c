"""Judges one answer's text.

Exact match and F1 are those of SQuAD's evaluation script (Rajpurkar et al. 2016, arXiv:1606.05250): case, punctuation,
articles and white space do not count, and the best of several references does.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

NOT_FOUND = (
    "not in the document",
    "not in the context",
    "not mentioned",
    "not specified",
    "not provided",
    "not stated",
    "does not say",
    "do not say",
    "does not mention",
    "do not mention",
    "does not provide",
    "do not provide",
    "no information",
    "cannot find",
    "can't find",
    "i don't know",
    "i do not know",
)
"""What an answer holds that says that the documents do not answer the question."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """A text as SQuAD compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, else 0.0."""
    return float(any(normalised(answer) == normalised(each) for each in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of the words' precision and recall, 0.0 to 1.0, for the best reference."""
    return max(_f1(normalised(answer).split(), normalised(each).split()) for each in references)


def contains(answer: str, references: Sequence[str]) -> float:
    """1.0 if the words of a reference stand in the answer one after another, else 0.0."""
    said = f" {normalised(answer)} "
    return float(any(words and f" {words} " in said for words in map(normalised, references)))


def says_not_found(answer: str, phrases: Sequence[str] = NOT_FOUND) -> bool:
    """Whether the answer says that the documents do not hold it: whether it has one of these phrases, in any case."""
    said = " ".join(answer.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
    return any(phrase.lower() in said for phrase in phrases)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))
