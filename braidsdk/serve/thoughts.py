"""Tells a model's thoughts from its answer, piece by piece."""

from typing import Literal

OPENING, CLOSING = "<think>", "</think>"

Kind = Literal["thought", "text"]


class Thoughts:
    """Splits a text at `<think>` and `</think>`. A thought stands at the text's start, or was opened by the chat
    template before it; later marks are plain text. White space around the marks belongs to neither part."""

    def __init__(self, *, opened: bool) -> None:
        """Before the first piece.

        Args:
            opened: whether the chat template has opened a thought.
        """
        self._state: Literal["start", "opened", "thought", "closed", "text"] = "opened" if opened else "start"
        self._held = ""

    def feed(self, piece: str) -> list[tuple[Kind, str]]:
        """What can be told of the text so far, and has not been yet."""
        return [each for each in self._split(self._held + piece) if each[1]]

    def end(self) -> list[tuple[Kind, str]]:
        """What was held back, since a mark might have followed."""
        held, self._held = self._held, ""
        kind: Kind = "thought" if self._state == "thought" else "text"
        return [(kind, held)] if held else []

    def _split(self, text: str) -> list[tuple[Kind, str]]:
        self._held = ""
        found: list[tuple[Kind, str]] = []
        if self._state == "start":
            begun = text.lstrip()
            if begun.startswith(OPENING):
                self._state, text = "opened", begun.removeprefix(OPENING)
            elif OPENING.startswith(begun):  # also if nothing is there yet
                self._held = text
                return []
            else:
                self._state = "text"
        if self._state == "opened":
            text = text.lstrip()
            self._state = "thought" if text else "opened"
        if self._state == "thought":
            thought, mark, text = text.partition(CLOSING)
            if not mark:
                kept = _start_of(thought, CLOSING)
                self._held = thought[kept:]
                return [("thought", thought[:kept])]
            found.append(("thought", thought.rstrip()))
            self._state = "closed"
        if self._state == "closed":
            text = text.lstrip()
            self._state = "text" if text else "closed"
        if self._state == "text":
            found.append(("text", text))
        return found


def _start_of(text: str, mark: str) -> int:
    """Where white space, and after it perhaps the start of a mark, ends a text; its length if none does."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            text = text[:-size]
            break
    return len(text.rstrip())
