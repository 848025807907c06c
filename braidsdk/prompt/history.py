"""A conversation's past turns: what the caller gives, and the ids that the conversation had.

Knows nothing about tensors, models or caches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from braidsdk.errors import InputError
from braidsdk.prompt.lru import LRU, nbytes_of
from braidsdk.prompt.text import normalise


class Layout(Protocol):
    """The part of the prompt's layout that a conversation needs."""

    @property
    def turn_ids(self) -> tuple[int, ...]: ...
    def question_ids(self, question: str) -> tuple[int, ...]: ...
    def answer_ids(self, text: str) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Spoken:
    """The ids of an answer, without what closes it.

    Attributes:
        token_ids: the ids.
        computed: how many of them have keys and values; of an answer that was cut off the last has none.
    """

    token_ids: tuple[int, ...]
    computed: int


@dataclass(frozen=True)
class Turn:
    """A question of the past and its answer, both normalised."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """The ids that stand between the chunks and a new question.

    Attributes:
        turns: one segment each.
        opening: ids that the new tail begins with: what the last turn's segment leaves out, its end, the user header.
    """

    turns: tuple[tuple[int, ...], ...] = ()
    opening: tuple[int, ...] = ()


class SpokenTurns:
    """The ids of recent answers, so that a conversation goes on with the very ids that it had.

    Encoding an answer's text again may give others. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._known: LRU[tuple[tuple[int, ...], str], Spoken] = LRU()

    def remember(self, tail: tuple[int, ...], text: str, spoken: Spoken) -> None:
        """Keep the ids of an answer to a tail; one that a history can't hold, such as an empty one, is left out."""
        try:
            clean = normalise(text)
        except InputError:
            return
        self._known.put((tail, clean), spoken, nbytes_of(clean, tail, spoken.token_ids))

    def recall(self, tail: tuple[int, ...], text: str) -> Spoken | None:
        """The ids of that normalised answer to that tail, the latest if there were several."""
        return self._known.get((tail, text))


def parse_history(history: Sequence[Mapping[str, str]]) -> tuple[Turn, ...]:
    """Check a history.

    Args:
        history: messages with "role" and "content": "user" and "assistant" by turns, from a user's first question to an
            answer. None of them holds the chunks: those stand before the first question anyway.

    Raises:
        InputError: roles, keys or contents are not like that.
        EmptyTextError: a question holds nothing but white space.
    """
    wanted = "history must be messages {'role': ..., 'content': ...} of user and assistant by turns, the user's first"
    if isinstance(history, str | Mapping) or not isinstance(history, Sequence):
        raise InputError(f"{wanted}; got a {type(history).__name__}.")
    for index, message in enumerate(history):
        role = ("user", "assistant")[index % 2]
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InputError(f"{wanted}; message {index} is not of that form.")
        if message["role"] != role:
            raise InputError(f"{wanted}; message {index} has role {str(message['role'])[:40]!r}, expected {role!r}.")
        if not isinstance(message["content"], str):
            raise InputError(f"{wanted}; the content of message {index} is a {type(message['content']).__name__}.")
    if len(history) % 2:
        raise InputError(f"{wanted}; it ends with a user's message. Give that as the question instead.")
    texts = [
        normalise(message["content"], f"Message {index} of history")
        if message["role"] == "user" or message["content"].strip()
        else ""  # the model may have ended at once
        for index, message in enumerate(history)
    ]
    return tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=True))


def conversation(turns: Sequence[Turn], layout: Layout, spoken: SpokenTurns) -> Conversation:
    """The ids of past turns: an answer's own where they are known, otherwise those of its text.

    A turn's segment ends where the keys and values of the call that answered it end, so that they serve as they are.
    """
    pieces: list[tuple[int, ...]] = []
    opening: tuple[int, ...] = ()
    for turn in turns:
        tail = opening + layout.question_ids(turn.question)
        said = spoken.recall(tail, turn.answer)
        if said is None:
            ids = layout.answer_ids(turn.answer)
            said = Spoken(ids, len(ids))
        pieces.append(tail + said.token_ids[: said.computed])
        opening = said.token_ids[said.computed :] + layout.turn_ids
    return Conversation(tuple(pieces), opening)
