"""How the command line ends: its exit codes, and its errors as a line on stderr."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from braidsdk import errors
from braidsdk.cli.output import Output
from braidsdk.errors import BraidError, InputError

FAILED, USAGE, NOT_FOUND, INCOMPATIBLE, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 4, 130, 141

MEANINGS = {
    0: "success",
    FAILED: "failed",
    USAGE: "usage error: an option or argument can't be used",
    NOT_FOUND: "not found: no such chunk, model, file or store",
    INCOMPATIBLE: "incompatible or corrupt: the store or the model",
    INTERRUPTED: "interrupted (Ctrl-C)",
}
"""Exit codes, as `braid --help` shows them. 141 means that the reader of the output went away; no message is shown."""


class NotFoundError(InputError):
    """A file, folder or store that was named does not exist."""


_CODES: tuple[tuple[type[BraidError], int], ...] = (
    (NotFoundError, NOT_FOUND),
    (errors.UnknownChunkError, NOT_FOUND),
    (errors.ModelNotFoundError, NOT_FOUND),
    (errors.StoreVersionError, INCOMPATIBLE),
    (errors.StoreCorruptError, INCOMPATIBLE),
    (errors.ArchiveError, INCOMPATIBLE),
    (errors.UnsupportedModelError, INCOMPATIBLE),
    (errors.WeightsError, INCOMPATIBLE),
    (errors.WindowExceededError, FAILED),
    (errors.NameTakenError, FAILED),
    (InputError, USAGE),
)
"""The first class that fits gives the exit code. An error that fits none gives `FAILED`."""


def code_of(error: Exception) -> int:
    """The exit code of an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


@contextmanager
def ending_well(out: Output) -> Iterator[None]:
    """Turn what a command raises into a line on stderr and an exit code. A traceback is shown only with `--debug`.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: out.warn(str(message))
            yield
        sys.stdout.flush()  # now, while an error about a reader that went away can still be handled
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        out.error("interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except Exception as error:  # for any error a user gets a sentence
        report(out, error)
        raise typer.Exit(code_of(error)) from None


def report(out: Output, error: Exception) -> None:
    """Say what went wrong. Only `--debug` shows where."""
    if out.debug:
        traceback.print_exception(error)
    if isinstance(error, BraidError):
        out.error(str(error))
    else:
        out.error(f"{type(error).__name__}: {error}\nThis error is not expected. --debug shows where it happened.")
