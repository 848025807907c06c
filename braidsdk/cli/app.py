"""The `braid` command: its subcommands, one module each.

Commands that need a model import what loads it, so that the other commands start at once.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from braidsdk import __version__
from braidsdk.cli import archive, chunks, store
from braidsdk.cli.add import add
from braidsdk.cli.ask import ask
from braidsdk.cli.chat import chat
from braidsdk.cli.command import command
from braidsdk.cli.doctor import doctor
from braidsdk.cli.exits import MEANINGS
from braidsdk.cli.fidelity import fidelity
from braidsdk.cli.options import TINY, DeviceOption, ModelOption, StoreOption
from braidsdk.cli.output import Output
from braidsdk.cli.serve import serve
from braidsdk.cli.stats import stats

app = typer.Typer(
    help="Composable context caching: register documents once, compose their KV caches, ask.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + ".",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point."""
    if sys.stdin is None:  # it was closed
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - open as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(BrokenPipeError):
        app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"braid {__version__}")
        raise typer.Exit


@app.callback()
def braid(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Composable context caching: register documents once, compose their KV caches, ask."""


def demo(out: Output, store: StoreOption = None, device: DeviceOption = "auto", model: ModelOption = TINY) -> None:
    """Register the sample documents, then answer questions over them from a second process."""
    from braidsdk.cli.demo import run_demo

    if not run_demo(store, device=device, model=model, as_json=out.json, quiet=out.quiet):
        raise typer.Exit(1)


for each in (
    demo,
    add,
    chunks.ls,
    chunks.show,
    chunks.log,
    chunks.restore,
    chunks.pin,
    chunks.rm,
    ask,
    serve,
    chat,
    fidelity,
    stats,
    doctor,
    store.gc,
):
    app.command()(command(each, computes=each in (demo, add, ask, serve, chat, fidelity)))

stores = typer.Typer(help="Look after a store.", no_args_is_help=True)
stores.command()(command(store.check))
stores.command("repair")(command(store.repair_store))
stores.command()(command(store.limit))
stores.command()(command(archive.export))
stores.command("import")(command(archive.import_archive))
app.add_typer(stores, name="store")
