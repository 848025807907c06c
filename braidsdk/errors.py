"""Every error that BraidSDK raises.

Each message says what must be, what was given, and what to do: "<what> must be <expected>; got <value>. <remedy>". No
message holds tensor contents or long parts of a user's text, and none is longer than a screen.

    BraidError
    ├── InputError (ValueError)            an argument can't be used
    │   ├── EmptyTextError                 a text is empty once it is stripped
    │   ├── WindowExceededError            there are more tokens than the model's window holds
    │   ├── NameTakenError                 the name stands for another text
    │   ├── UnknownChunkError (LookupError) this namespace has no chunk of that name or id
    │   └── UnknownModeError               there is no such composition mode
    ├── ModelError                         a checkpoint can't be used
    │   ├── ModelNotFoundError             there is no checkpoint
    │   │   └── HubError                   the hub did not give it: offline, no such name, or no permission
    │   ├── UnsupportedModelError          its config asks for something that BraidSDK does not compute
    │   └── WeightsError                   weights are missing, unexpected, misshapen or not finite
    ├── StoreError                         the chunk store can't be used
    │   ├── StorePathError                 the path is a file, or can't be written
    │   ├── ArchiveError                   a file is no archive of a store, was changed, or can't be used here
    │   ├── StoreReadOnlyError             the store can only be read, and something must be written
    │   ├── StoreReplacedError             the store's folder was removed or replaced while it was open
    │   ├── StoreVersionError              a newer BraidSDK wrote it
    │   ├── StoreCorruptError              the index is damaged
    │   ├── StoreFullError                 the disk has no room for what must be written
    │   └── HashCollisionError             two different contents share a hash
    ├── NumericsError (ArithmeticError)    the model gave NaN or infinite logits
    ├── PoolFullError (MemoryError)        a call needs more KV memory than the device's pool has
    ├── QueueFullError                     more requests wait than max_queue allows
    ├── DeadlineError (TimeoutError)       the answer was not complete within timeout_s
    ├── EngineError                        the engine's thread failed, and every request with it
    └── ClosedError                        something was used after close()
        └── ForkedError                    something was used in a fork of the process that opened it
"""

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST_MESSAGE = 1_600
"""The most characters of an error's message. A screen of 24 lines of 80 characters holds it."""

__all__ = [
    "ArchiveError",
    "BraidError",
    "ClosedError",
    "DeadlineError",
    "EmptyTextError",
    "EngineError",
    "ForkedError",
    "HashCollisionError",
    "HubError",
    "InputError",
    "ModelError",
    "ModelNotFoundError",
    "NameTakenError",
    "NumericsError",
    "PoolFullError",
    "QueueFullError",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
    "StorePathError",
    "StoreReadOnlyError",
    "StoreReplacedError",
    "StoreVersionError",
    "UnknownChunkError",
    "UnknownModeError",
    "UnsupportedModelError",
    "WeightsError",
    "WindowExceededError",
]


def did_you_mean(given: object, known: "Iterable[str]") -> str:
    """The end of a message about a misspelt word: " Did you mean 'x'?", or "" if no known word resembles it."""
    close = difflib.get_close_matches(str(given)[:200].lower(), list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def shown(given: object, limit: int = 80) -> str:
    """A given value for a message: its repr as ASCII, cut to `limit` characters."""
    text = ascii(given)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class BraidError(Exception):
    """Base of every error that BraidSDK raises."""

    def __init__(self, message: str = "") -> None:
        """Keep the message. If it is longer than a screen, its middle is left out, so that it still ends with what to
        do.

        Args:
            message: a message for people.
        """
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2 - 4
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)


class InputError(BraidError, ValueError):
    """An argument can't be used."""


class EmptyTextError(InputError):
    """A text is empty once it is stripped."""


class WindowExceededError(InputError):
    """There are more tokens than the model's window holds."""


class NameTakenError(InputError):
    """The name already stands for another text."""


class UnknownChunkError(InputError, LookupError):
    """This namespace has no chunk of that name or id."""


class UnknownModeError(InputError):
    """There is no such composition mode."""


class ModelError(BraidError):
    """A checkpoint can't be used."""


class ModelNotFoundError(ModelError):
    """There is no checkpoint where one was named."""


class HubError(ModelNotFoundError):
    """The hub did not give a checkpoint: it can't be reached, does not have it, or asks for permission."""


class UnsupportedModelError(ModelError):
    """The checkpoint's config asks for something that BraidSDK does not compute."""


class WeightsError(ModelError):
    """Weights are missing, unexpected, misshapen or not finite."""


class StoreError(BraidError):
    """The chunk store can't be used."""


class StorePathError(StoreError):
    """The store's path is a file, or can't be written."""


class StoreReadOnlyError(StoreError):
    """The store can only be read, and something must be written."""


class StoreReplacedError(StoreError):
    """The store's folder was removed or replaced while it was open. What was registered since is not kept."""


class StoreVersionError(StoreError):
    """A newer BraidSDK wrote the store."""


class StoreCorruptError(StoreError):
    """The store's index is damaged."""


class StoreFullError(StoreError):
    """The store's disk has no room for what must be written."""


class ArchiveError(StoreError):
    """A file is no archive of a store, was changed, or can't be used here."""


class HashCollisionError(StoreError):
    """Two different contents share one hash."""


class NumericsError(BraidError, ArithmeticError):
    """The model gave NaN or infinite logits."""


class PoolFullError(BraidError, MemoryError):
    """A call needs more KV memory than the device's pool has, or than other running calls leave of it."""


class QueueFullError(BraidError):
    """More requests wait than `max_queue` allows."""


class DeadlineError(BraidError, TimeoutError):
    """A call was not complete within its `timeout_s`. Its work was stopped."""


class EngineError(BraidError):
    """The engine's thread failed, and every request with it. The Braid can't be used any more."""


class ClosedError(BraidError):
    """Something was used after close()."""


class ForkedError(ClosedError):
    """Something was used in a fork of the process that opened it."""
