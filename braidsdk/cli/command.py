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
"""Opening a model reads this variable. Its name is repeated here, because the module that reads it imports torch."""

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
    """Turn a function that reports to an `Output` into a command. It gets the common options, and ends as `exits` says.

    `computes` says whether it runs a model. If so, it gets the option `--verbose-kernels`.
    """

    @wraps(function)
    def run(*, json: bool, quiet: bool, debug: bool, verbose_kernels: bool = False, **arguments: Any) -> None:
        if verbose_kernels:
            os.environ[_VERBOSE] = "1"  # also for processes that the command starts
        out = Output(json, quiet, debug)
        with ending_well(out):
            function(out, **arguments)

    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own] + [_VERBOSE_KERNELS] * computes + _COMMON
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads options from it
    return run
