"""Let a retriever choose the documents for each question: all choices are answered from the same stored entries.

The retriever is BM25 on words, in thirty lines; put yours in its place. It only has to return names.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

from braidsdk import Braid

DOCUMENTS = {
    "aistonia": "The capital of Aistonia is Flubarg. The currency of Aistonia is the Quorra.",
    "belmora": "The longest river of Belmora is the Droune. The highest mountain of Belmora is Plamint.",
    "thessily": "The capital of Thessily is Troick. The favourite dish of Thessily is Tathulo.",
    "falkirra": "The capital of Falkirra is Jassik. The national animal of Falkirra is the Gistarn.",
    "pelluria": "Slemune founded Pelluria. The currency of Pelluria is the Skaveth.",
}
QUESTIONS = [
    "What is the capital of Thessily?",
    "Which river flows through Belmora?",
    "Who founded Pelluria?",
    "What is the capital of Falkirra?",
]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class BM25:
    """Okapi BM25 (Robertson and Zaragoza, 2009), with its usual k1 = 1.5 and b = 0.75."""

    def __init__(self, documents: Mapping[str, str], k1: float = 1.5, b: float = 0.75) -> None:
        self._counts = {name: Counter(words(text)) for name, text in documents.items()}
        lengths = {name: counts.total() for name, counts in self._counts.items()}
        mean = sum(lengths.values()) / len(lengths)
        self._norms = {name: k1 * (1 - b + b * length / mean) for name, length in lengths.items()}
        self._k1 = k1
        holding = Counter(word for counts in self._counts.values() for word in counts)
        total = len(documents)
        self._rarity = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in holding.items()}

    def best(self, question: str, count: int) -> list[str]:
        """Names of the documents that fit the question best, the best one first."""
        asked = [word for word in words(question) if word in self._rarity]

        def score(name: str) -> float:
            counts, norm = self._counts[name], self._norms[name]
            return sum(self._rarity[word] * counts[word] * (self._k1 + 1) / (counts[word] + norm) for word in asked)

        return sorted(self._counts, key=score, reverse=True)[:count]


with Braid("braid-tiny", namespace="retriever") as braid:
    rules = braid.register_system("You answer questions from the documents.")
    braid.register_many(list(DOCUMENTS.values()), names=list(DOCUMENTS), anchor=rules)
    retriever = BM25(DOCUMENTS)
    for question in QUESTIONS:
        found = retriever.best(question, count=2)
        answer = braid.ask(question, chunks=[rules, *found])
        cached, computed = answer.usage.cached_tokens, answer.usage.computed_tokens
        print(f"{question} {answer} ({' and '.join(found)}: {cached} tokens from the cache, {computed} computed)")
