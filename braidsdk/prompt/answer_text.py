"""The text of an answer while its ids arrive: characters are never split, stop strings never shown."""

from collections.abc import Collection, Sequence
from typing import Protocol

from braidsdk.prompt.stop_strings import StopStrings


class Detokenizer(Protocol):
    """Turns ids into text one by one."""

    def feed(self, token_id: int) -> str:
        """The text that can be shown since the id before; "" if there is none."""
        ...

    def flush(self) -> str:
        """What was held back, once there are no more ids."""
        ...


class Layout(Protocol):
    """The part of the prompt's layout that an answer's text needs."""

    def detokenizer(self) -> Detokenizer: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class AnswerText:
    """One answer's text.

    Attributes:
        text: what may be shown so far.
        stopped: whether a stop string is complete; no id after that counts.
    """

    def __init__(self, layout: Layout, stop: Sequence[str], stop_ids: Collection[int]) -> None:
        """Args:
        layout: whose ids they are.
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
        return self._stop.found

    def feed(self, token_id: int) -> str:
        """Take the next id; the text that can be shown since the one before."""
        if token_id in self._stop_ids:
            return ""
        self._ids.append(token_id)
        piece = self._detokenizer.feed(token_id)
        return self._show(self._stop.feed(piece) if self._stops else piece)

    def end(self) -> str:
        """There are no more ids: the rest of the text."""
        if self.stopped:
            return ""
        shown = self._show(self._stop.feed(self._detokenizer.flush()))
        return shown + self._show(self._stop.flush())

    def ids(self) -> tuple[int, ...]:
        """The ids that the text is made of: without the one that closes the answer, and without those of a stop string
        and what follows it."""
        ids = self._ids
        if self.stopped:
            while ids and len(self._layout.decode(ids)) > len(self.text):
                ids = ids[:-1]
        return tuple(ids)

    def _show(self, piece: str) -> str:
        self.text += piece
        return piece
