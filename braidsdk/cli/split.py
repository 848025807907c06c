"""Cuts long texts into pieces with a limited number of tokens, at the ends of paragraphs and sentences.

semantic-text-splitter does the cutting. A sentence that is too long is cut between words.
"""

from collections.abc import Callable, Sequence

from semantic_text_splitter import TextSplitter

from braidsdk.errors import InputError

LEAST_TOKENS = 16
"""A smaller budget would mostly cut inside sentences."""


class Splitter:
    """Cuts texts; the same text always gives the same pieces."""

    def __init__(self, count: Callable[[str], int], budget: int) -> None:
        """Prepare to cut texts.

        Args:
            count: how many tokens a piece takes.
            budget: the most tokens that a piece may take.

        Raises:
            InputError: the budget is below `LEAST_TOKENS`.
        """
        if budget < LEAST_TOKENS:
            raise InputError(f"--chunk-tokens must be at least {LEAST_TOKENS}, or 0 for whole files; got {budget}.")
        self._count = count
        self._budget = budget
        self._splitter = TextSplitter.from_callback(count, budget)

    def split(self, text: str) -> Sequence[str]:
        """The pieces of a text, without white space around them."""
        return [text] if self._count(text) <= self._budget else self._splitter.chunks(text)
