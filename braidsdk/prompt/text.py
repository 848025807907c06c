"""Texts that users give: which are refused before they are encoded, and how the others are normalised."""

import unicodedata

from braidsdk.errors import EmptyTextError, InputError, WindowExceededError

MARKS_IN_A_ROW = 256
"""This many combining marks in a row are refused, because NFC takes time that grows with the square of their number.
Unicode's stream-safe text format (UAX #15, section 13) allows 30."""

CHARACTERS_PER_TOKEN = 32
"""A text with more characters than this for each token of the window is refused before it is tokenized. Prose has 3 to
6."""


def is_unicode(text: str) -> bool:
    """Whether a str can be encoded. One with half a surrogate pair can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def normalise(text: str, what: str = "The text") -> str:
    """NFC-normalise and strip a text.

    Raises:
        EmptyTextError: nothing is left.
        InputError: it is not text, or holds half a surrogate pair, or too many combining marks in a row.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} must be text; got a {type(text).__name__}.")
    if not is_unicode(text):
        raise InputError(
            f"{what} must hold whole Unicode characters; got half a surrogate pair. Decode it again with "
            "errors='replace'."
        )
    if _has_too_many_marks(text):
        raise InputError(
            f"{what} must have fewer than {MARKS_IN_A_ROW} combining marks in a row; got more. Leave some out: no "
            "script needs so many."
        )
    clean = unicodedata.normalize("NFC", text).strip()
    if not clean:
        raise EmptyTextError(f"{what} must hold something besides white space; got {len(text)} characters of it.")
    return clean


def _has_too_many_marks(text: str) -> bool:
    """Whether one of the text's blocks of `MARKS_IN_A_ROW` characters holds nothing but marks. Any run of twice that
    length fills a block, and the search leaves most blocks at their first character."""
    starts = range(0, len(text) - MARKS_IN_A_ROW + 1, MARKS_IN_A_ROW)
    return any(all(map(_is_mark, text[start : start + MARKS_IN_A_ROW])) for start in starts)


def _is_mark(character: str) -> bool:
    """Whether NFC sorts the character among its neighbours. Three have no class themselves, but their parts do."""
    return unicodedata.combining(character) != 0 or character in "\u0f73\u0f75\u0f81"


def check_length(text: str, window: int, what: str, remedy: str) -> None:
    """Raise `WindowExceededError` for a text that is too long to be worth normalising and tokenizing. For a megabyte
    that takes a second and 150 MB."""
    limit = window * CHARACTERS_PER_TOKEN
    if len(text) > limit:
        raise WindowExceededError(
            f"{what} must have at most {limit:,} characters, {CHARACTERS_PER_TOKEN} for each token of the model's "
            f"window; got {len(text):,}. {remedy}"
        )


def check_window(tokens: int, window: int, what: str, remedy: str) -> None:
    """Raise `WindowExceededError` unless `tokens` fit in the model's window with room for one more."""
    if tokens >= window:
        raise WindowExceededError(
            f"{what} must take fewer than {window:,} tokens, so that an answer fits into the model's window; got "
            f"{tokens:,}. {remedy}"
        )
