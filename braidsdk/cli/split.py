"""Cutting long texts into pieces of at most so many tokens, at the ends of paragraphs and sentences.

The cutting is semantic-text-splitter's; within a sentence that is too long it falls between words.
"""

from collections.abc import Callable, Sequence

from semantic_text_splitter import TextSplitter

from braidsdk.errors import InputError

LEAST_TOKENS = 16
"""A smaller budget would cut within sentences all the time."""


class Splitter:
    """Cuts texts; the same text always gives the same pieces."""

    def __init__(self, count: Callable[[str], int], budget: int) -> None:
        """Args:
            count: how many tokens a piece takes.
            budget: at most so many.

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
