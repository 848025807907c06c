"""Ends a text before a stop string while the text arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string.

    If the text so far ends in what may be the start of a stop string, that end is held back until it is known whether
    it is one. So no part of a stop string is ever let through. If there are several stop strings, the one that is
    complete first counts; among those that end together, the longest.

    Attributes:
        found: the stop string that is complete; None while none is. Nothing is let through after that.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Take the next piece of text. Returns the part of the text so far that may be shown now."""
        if self.found or not self._stop:  # a stop string has characters
            return "" if self.found else piece
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, start = min(ends)
            self.found, self._held = text[start:end], ""
            return text[:start]
        open_from = next(
            start for start in range(len(text) + 1) if any(stop.startswith(text[start:]) for stop in self._stop)
        )
        self._held = text[open_from:]
        return text[:open_from]

    def flush(self) -> str:
        """The text has ended. Returns what was held back."""
        rest, self._held = self._held, ""
        return rest
