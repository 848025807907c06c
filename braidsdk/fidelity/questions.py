"""Questions to measure with: what is asked, what the answer should be, and what it is asked over. Reads their files.

A file is JSON or JSON lines (`.jsonl`). Each question is an object:

    {"question": "...", "answers": ["..."]}                           over the chunks that the call selects
    {"question": "...", "answers": ["..."], "chunks": ["name", ...]}  over registered chunks, by name or id
    {"question": "...", "answers": ["..."], "passages": ["...", ...]} over texts of its own

JSON is a list of them, or an object with the list under "questions". Such an object may hold texts, or objects with a
"text", under "passages"; numbers among a question's passages then are places in that list. Other fields do not count.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidsdk.errors import InputError, shown


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question: its text.
        answers: references; any of them is right. Empty if none is known.
        chunks: names or ids of the registered chunks that it is asked over; None for those that the call selects.
        passages: the texts that it is asked over instead of registered chunks; None for none.
    """

    question: str
    answers: tuple[str, ...] = ()
    chunks: tuple[str, ...] | None = None
    passages: tuple[str, ...] | None = None


def parse_questions(
    given: Sequence[object], where: str = "questions[{}]", passages: Sequence[object] = (), first: int = 0
) -> list[Question]:
    """Questions from texts, objects of the form above, or both.

    Args:
        given: the texts and objects.
        where: how a message names a place, with `{}` for its number.
        passages: texts that numbers among a question's passages stand for.
        first: the number of the first place.

    Raises:
        InputError: there are none, or one can't be used.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise InputError(f"questions must be a list; got a {type(given).__name__}. Put a single one into a list.")
    if not given:
        raise InputError("questions must hold at least one question; got none. Add some.")
    return [_question(each, where.format(first + place), passages) for place, each in enumerate(given)]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        InputError: it can't be read, or holds something else. The message says where.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be text in UTF-8; byte {error.start} is not. Convert it.") from error
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines:
            raise InputError(f"{path} must hold at least one question; it is empty. Add some.")
        return [_question(_json(line, path, number), f"{path}, line {number}", ()) for number, line in lines]
    content = _json(text, path, 1)
    passages: list[object] = []
    if isinstance(content, Mapping):
        passages = content.get("passages", [])
        if not isinstance(passages, list):
            raise InputError(f'"passages" of {path} must be a list; got a {type(passages).__name__}.')
        content = content.get("questions")
    if not isinstance(content, list):
        raise InputError(
            f'{path} must hold a list of questions, or an object with a list under "questions"; got a '
            f"{type(content).__name__}. See docs/quality.md for the form."
        )
    return parse_questions(content, f"{path}, question {{}}", passages, first=1)


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} must be JSON; line {line + error.lineno - 1}, column {error.colno} is not: {error.msg}."
            + (" JSON lines have the suffix .jsonl." if error.msg == "Extra data" else "")
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} must be JSON; its brackets are too deep.") from error


def _question(given: object, where: str, shared: Sequence[object]) -> Question:
    if isinstance(given, Question):
        given = {name: value for name, value in vars(given).items() if value is not None}
    if isinstance(given, str):
        given = {"question": given}
    if not isinstance(given, Mapping):
        raise InputError(f'{where} must be a text, or an object with a "question"; got a {type(given).__name__}.')
    question = given.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'{where} must have a text under "question"; got {shown(question)}.')
    chunks = None if given.get("chunks") is None else _texts(given["chunks"], f'"chunks" of {where}')
    passages = given.get("passages")
    if passages is not None:
        if chunks is not None:
            raise InputError(f'{where} must have "chunks" or "passages"; it has both. Leave one out.')
        if isinstance(passages, list | tuple):
            passages = [_passage(each, shared) for each in passages]
        passages = _texts(passages, f'"passages" of {where}')
    return Question(question, references_of(given.get("answers"), f'"answers" of {where}'), chunks, passages)


def references_of(given: object, where: str) -> tuple[str, ...]:
    """The references that a text, a list of texts, or None stands for.

    Raises:
        InputError: it is none of these.
    """
    if given is None or given == [] or given == ():
        return ()
    return _texts([given] if isinstance(given, str) else given, where)


def _passage(given: object, shared: Sequence[object]) -> object:
    """A passage's text, where it is a number in the file's own list or an object with a text."""
    if type(given) is int and 0 <= given < len(shared):
        given = shared[given]
    return given.get("text") if isinstance(given, Mapping) else given


def _texts(given: object, where: str) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise InputError(f"{where} must be a list of texts; got {shown(given)}.")
    for place, each in enumerate(given):
        if not isinstance(each, str) or not each.strip():
            raise InputError(f"{where} must be a list of texts; place {place + 1} is {shown(each)}.")
    return tuple(given)
