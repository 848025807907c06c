"""What all commands of `braid` have in common: `--json`, `--quiet`, `--debug`, and how they end."""

import inspect
import os
from collections.abc import Callable
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, Concatenate

import typer

from braidsdk.cli.exits import ending_well
from braidsdk.cli.output import Output

_VERBOSE = "BRAID_VERBOSE_KERNELS"
"""Read when a model is opened. Spelt out here, because the module that reads it imports torch."""

_COMMON = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
    for name, option in (
        ("json", typer.Option("--json", help="Print JSON on stdout.")),
        ("quiet", typer.Option("--quiet", "-q", help="No notes, warnings or progress.")),
        ("debug", typer.Option("--debug", help="Show a traceback when something fails.")),
    )
]

_VERBOSE_KERNELS = Parameter(
    "verbose_kernels",
    Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--verbose-kernels",
            envvar=_VERBOSE,
            help="At the end, show calls, time and bytes of the model's operations. Turns CUDA graphs off.",
        ),
    ],
)


def command(function: Callable[Concatenate[Output, ...], None], *, computes: bool = False) -> Callable[..., None]:
    """A function that reports to an `Output`, as a command: with the common options, and ending as `exits` says.

    `computes`: whether it runs a model, so that `--verbose-kernels` is an option of it.
    """

    @wraps(function)
    def run(*, json: bool, quiet: bool, debug: bool, verbose_kernels: bool = False, **arguments: Any) -> None:
        if verbose_kernels:
            os.environ[_VERBOSE] = "1"  # for processes that the command starts, too
        out = Output(json, quiet, debug)
        with ending_well(out):
            function(out, **arguments)

    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own] + [_VERBOSE_KERNELS] * computes + _COMMON
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads options from it
    return run
