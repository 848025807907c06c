"""A conversation's past turns: the texts that the caller gives, and the ids that the conversation had.

Knows nothing about tensors, models or caches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from braidsdk.errors import InputError
from braidsdk.prompt.lru import LRU, nbytes_of
from braidsdk.prompt.text import check_length, normalise


class Layout(Protocol):
    """The part of the prompt's layout that a conversation needs."""

    @property
    def turn_ids(self) -> tuple[int, ...]: ...
    def question_ids(self, question: str, *, follows: bool = ..., past: bool = ...) -> tuple[int, ...]: ...
    def answer_ids(self, text: str) -> tuple[int, ...]: ...
    def thinks_on(self, answer_ids: Sequence[int]) -> bool: ...


@dataclass(frozen=True)
class Spoken:
    """The ids of an answer, without what closes it.

    Attributes:
        token_ids: the ids.
        computed: how many of them have keys and values. The last id of an answer that was cut off has none.
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
        opening: ids that the new tail begins with: those that the last turn's segment leaves out, then the turn's end
            and the user header.
    """

    turns: tuple[tuple[int, ...], ...] = ()
    opening: tuple[int, ...] = ()


class SpokenTurns:
    """The ids of recent answers, so that a conversation goes on with the same ids that it had.

    Encoding an answer's text again may give other ids. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._known: LRU[tuple[tuple[int, ...], str], Spoken] = LRU()

    def remember(self, tail: tuple[int, ...], text: str, spoken: Spoken) -> None:
        """Keep the ids of an answer to a tail. Skip an answer that a history can't hold, such as an empty one."""
        try:
            clean = normalise(text)
        except InputError:
            return
        self._known.put((tail, clean), spoken, nbytes_of(clean, tail, spoken.token_ids))

    def recall(self, tail: tuple[int, ...], text: str) -> Spoken | None:
        """The ids of a normalised answer to a tail, the latest if there were several. None if they are not known."""
        return self._known.get((tail, text))


def parse_history(history: Sequence[Mapping[str, str]], window: int) -> tuple[Turn, ...]:
    """Check a history.

    Args:
        history: messages with "role" and "content". The roles alternate between "user" and "assistant", from the user's
            first question to an answer. No message holds the chunks, because they always stand before the first
            question.
        window: tokens of the model's window.

    Raises:
        InputError: a role, a key or a content is wrong.
        WindowExceededError: a content is too long to be encoded.
        EmptyTextError: a question holds nothing but white space.
    """
    wanted = (
        "history must be messages {'role': ..., 'content': ...} that alternate between user and assistant, the user's "
        "first"
    )
    if isinstance(history, str | Mapping) or not isinstance(history, Sequence):
        raise InputError(f"{wanted}; got a {type(history).__name__}.")
    for index, message in enumerate(history):
        role = ("user", "assistant")[index % 2]
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InputError(f"{wanted}; message {index} is not of that form.")
        if message["role"] != role:
            raise InputError(
                f"The role of message {index} of history must be {role!r}; got {str(message['role'])[:40]!r}."
            )
        if not isinstance(message["content"], str):
            raise InputError(
                f"The content of message {index} of history must be text; got a {type(message['content']).__name__}."
            )
        check_length(message["content"], window, f"Message {index} of history", "Shorten it, or leave it out.")
    if len(history) % 2:
        raise InputError("history must end with an answer; it ends with a user's message. Pass that as the question.")
    texts = [
        normalise(message["content"], f"Message {index} of history")
        if message["role"] == "user" or message["content"].strip()
        else ""  # the model may have ended its answer at once
        for index, message in enumerate(history)
    ]
    return tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=True))


def conversation(turns: Sequence[Turn], layout: Layout, spoken: SpokenTurns) -> Conversation:
    """The ids of past turns. A turn has the ids that it was answered with if they are known, else those that the chat
    template gives for its texts. So has a turn whose answer was cut off within a thought: all that follows would belong
    to the thought.

    A turn's segment ends where the keys and values of the call that answered it end, so that they can be used as they
    are.
    """
    pieces: list[tuple[int, ...]] = []
    opening: tuple[int, ...] = ()
    for turn in turns:
        follows = bool(pieces)
        tail = opening + layout.question_ids(turn.question, follows=follows)
        answer = spoken.recall(tail, turn.answer)
        if answer is None or layout.thinks_on(answer.token_ids):
            tail = opening + layout.question_ids(turn.question, follows=follows, past=True)
            ids = layout.answer_ids(turn.answer)
            answer = Spoken(ids, len(ids))
        pieces.append(tail + answer.token_ids[: answer.computed])
        opening = answer.token_ids[answer.computed :] + layout.turn_ids
    return Conversation(tuple(pieces), opening)
