"""The text of an answer while its ids arrive. Characters are never split, and stop strings are never shown."""

from collections.abc import Collection, Sequence
from typing import Protocol

from braidsdk.prompt.stop_strings import StopStrings


class Detokenizer(Protocol):
    """Turns ids into text one by one."""

    def feed(self, token_id: int) -> str:
        """Take the next id. Returns the text that can be shown since the id before it, "" if there is none."""
        ...

    def flush(self) -> str:
        """There are no more ids. Returns the text that was held back."""
        ...


class Layout(Protocol):
    """The part of the prompt's layout that an answer's text needs."""

    def detokenizer(self) -> Detokenizer: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class AnswerText:
    """One answer's text.

    Attributes:
        text: what may be shown so far.
        stopped: whether a stop string is complete. No id after that counts.
        stop_string: which one.
    """

    def __init__(self, layout: Layout, stop: Sequence[str], stop_ids: Collection[int]) -> None:
        """Start with an empty text.

        Args:
            layout: the layout of the model that generates the ids.
            stop: strings that end the text.
            stop_ids: ids that end the answer; they have no text.
        """
        self.text = ""
        self._layout = layout
        self._detokenizer = layout.detokenizer()
        self._stop = StopStrings(stop)
        self._stops = bool(stop)
        self._stop_ids = stop_ids
        self._ids: list[int] = []

    @property
    def stopped(self) -> bool:
        return self._stop.found is not None

    @property
    def stop_string(self) -> str | None:
        return self._stop.found

    def feed(self, token_id: int) -> str:
        """Take the next id. Returns the text that can be shown since the one before it."""
        if token_id in self._stop_ids:
            return ""
        self._ids.append(token_id)
        piece = self._detokenizer.feed(token_id)
        return self._show(self._stop.feed(piece) if self._stops else piece)

    def end(self) -> str:
        """There are no more ids. Returns the rest of the text."""
        if self.stopped:
            return ""
        shown = self._show(self._stop.feed(self._detokenizer.flush()))
        return shown + self._show(self._stop.flush())

    def ids(self) -> tuple[int, ...]:
        """The ids that make up the text. The id that closes the answer is left out, and so are those of a stop string
        and everything after it."""
        ids = self._ids
        if self.stopped:
            while ids and len(self._layout.decode(ids)) > len(self.text):
                ids = ids[:-1]
        return tuple(ids)

    def _show(self, piece: str) -> str:
        self.text += piece
        return piece
