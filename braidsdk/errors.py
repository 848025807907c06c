"""Every error that BraidSDK raises.

Each message gives what was expected, what came, and what to do. None holds tensor contents or long stretches of a
user's text, and none is longer than a screen.

    BraidError
    ├── InputError (ValueError)            an argument can't be used
    │   ├── EmptyTextError                 nothing is left of a text once it is stripped
    │   ├── WindowExceededError            more tokens than the model's window holds
    │   ├── NameTakenError                 the name stands for another text
    │   ├── UnknownChunkError (LookupError) no chunk of that name or id in this namespace
    │   └── UnknownModeError               no such composition mode
    ├── ModelError                         a checkpoint can't be used
    │   ├── ModelNotFoundError             no checkpoint there
    │   │   └── HubError                   the hub did not give it: offline, no such name, no permission
    │   ├── UnsupportedModelError          its config asks for what we do not compute
    │   └── WeightsError                   weights are missing, unexpected, misshapen or not finite
    ├── StoreError                         the chunk store can't be used
    │   ├── StorePathError                 the path is a file, or can't be written
    │   ├── StoreVersionError              written by a newer BraidSDK
    │   ├── StoreCorruptError              the index is damaged
    │   ├── StoreFullError                 what is to be written does not fit on the disk
    │   └── HashCollisionError             two different contents share a hash
    ├── NumericsError (ArithmeticError)    the model gave NaN or infinite logits
    ├── PoolFullError (MemoryError)        more KV memory than the device's pool holds
    ├── QueueFullError                     more requests wait than max_queue allows
    ├── DeadlineError (TimeoutError)       timeout_s is over before the answer is complete
    ├── EngineError                        the engine's thread failed, and ended every request
    └── ClosedError                        used after close()
        └── ForkedError                    used in a fork of the process that opened it
"""

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST_MESSAGE = 1_600
"""Characters of an error's message at most: a screen of 24 lines of 80 holds it."""

__all__ = [
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
    "StoreVersionError",
    "UnknownChunkError",
    "UnknownModeError",
    "UnsupportedModelError",
    "WeightsError",
    "WindowExceededError",
]


def did_you_mean(given: object, known: "Iterable[str]") -> str:
    """The end of a message about a misspelt word: " Did you mean 'x'?", or nothing if no known word resembles it."""
    close = difflib.get_close_matches(str(given)[:200].lower(), list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def shown(given: object, limit: int = 80) -> str:
    """What was given as ASCII, for a message: its repr, cut to so many characters."""
    text = ascii(given)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class BraidError(Exception):
    """Base of every error that BraidSDK raises."""

    def __init__(self, message: str = "") -> None:
        """Keep the message; of one longer than a screen the middle is left out, so that it ends with what to do.

        Args:
            message: for people.
        """
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2 - 4
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)


class InputError(BraidError, ValueError):
    """An argument can't be used."""


class EmptyTextError(InputError):
    """Nothing is left of a text once it is stripped."""


class WindowExceededError(InputError):
    """More tokens than the model's window holds."""


class NameTakenError(InputError):
    """The name already stands for another text."""


class UnknownChunkError(InputError, LookupError):
    """No chunk of that name or id in this namespace."""


class UnknownModeError(InputError):
    """No such composition mode."""


class ModelError(BraidError):
    """A checkpoint can't be used."""


class ModelNotFoundError(ModelError):
    """There is no checkpoint where one was named."""


class HubError(ModelNotFoundError):
    """The hub did not give a checkpoint: it can't be reached, has no such one, or asks for permission."""


class UnsupportedModelError(ModelError):
    """The checkpoint's config asks for something that BraidSDK does not compute."""


class WeightsError(ModelError):
    """Weights are missing, unexpected, misshapen or not finite."""


class StoreError(BraidError):
    """The chunk store can't be used."""


class StorePathError(StoreError):
    """The store's path is a file, or can't be written."""


class StoreVersionError(StoreError):
    """The store was written by a newer BraidSDK."""


class StoreCorruptError(StoreError):
    """The store's index is damaged."""


class StoreFullError(StoreError):
    """What is to be written does not fit on the store's disk."""


class HashCollisionError(StoreError):
    """Two different contents share one hash."""


class NumericsError(BraidError, ArithmeticError):
    """The model gave NaN or infinite logits."""


class PoolFullError(BraidError, MemoryError):
    """A call needs more KV memory than the device's pool holds beside other running calls."""


class QueueFullError(BraidError):
    """More requests wait than `max_queue` allows."""


class DeadlineError(BraidError, TimeoutError):
    """A call's `timeout_s` is over before its answer is complete; the work was stopped."""


class EngineError(BraidError):
    """The engine's thread failed, and every request with it."""


class ClosedError(BraidError):
    """Something was used after close()."""


class ForkedError(ClosedError):
    """Something was used in a fork of the process that opened it."""
