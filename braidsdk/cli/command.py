"""What all commands of `braid` have in common: `--json`, `--quiet`, `--debug`, and how they end."""

import inspect
from collections.abc import Callable
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, Concatenate

import typer

from braidsdk.cli.exits import ending_well
from braidsdk.cli.output import Output

_COMMON = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
    for name, option in (
        ("json", typer.Option("--json", help="Print JSON on stdout.")),
        ("quiet", typer.Option("--quiet", "-q", help="No notes, warnings or progress.")),
        ("debug", typer.Option("--debug", help="Show a traceback when something fails.")),
    )
]


def command(function: Callable[Concatenate[Output, ...], None]) -> Callable[..., None]:
    """A function that reports to an `Output`, as a command: with the common options, and ending as `exits` says."""

    @wraps(function)
    def run(*, json: bool, quiet: bool, debug: bool, **arguments: Any) -> None:
        out = Output(json, quiet, debug)
        with ending_well(out):
            function(out, **arguments)

    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own] + _COMMON
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads options from it
    return run
