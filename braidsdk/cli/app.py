"""`braid demo | add | ls | ask`. Data on stdout, all else on stderr."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from braidsdk.errors import BraidError, InputError

app = typer.Typer(
    help="Composable context caching: register documents once, compose their KV caches, ask.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str,
    typer.Option(envvar="BRAID_MODEL", help="braid-tiny, a checkpoint's folder, or a hub id such as Qwen/Qwen3-0.6B."),
]
StoreOption = Annotated[
    Path | None, typer.Option(envvar="BRAID_STORE", help="The chunk store's folder. Default: the user's data folder.")
]
DeviceOption = Annotated[str, typer.Option(envvar="BRAID_DEVICE", help="auto, cpu, cuda or cuda:N.")]
NamespaceOption = Annotated[str, typer.Option(envvar="BRAID_NAMESPACE", help="Namespace of the chunks.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_out = Console()
_err = Console(stderr=True, soft_wrap=True)
_TINY = "braid-tiny"


def main() -> None:
    """Entry point: a `BraidError` becomes one line on stderr and exit code 1."""
    try:
        app()
    except BraidError as error:
        _err.print(f"braid: {error}", markup=False, highlight=False)
        sys.exit(1)


@app.command()
def demo(
    store: StoreOption = None, device: DeviceOption = "auto", model: ModelOption = _TINY, as_json: JsonOption = False
) -> None:
    """Register the sample documents, then answer questions over them from a second process."""
    from braidsdk.cli.demo import run_demo

    if not run_demo(store, device=device, model=model, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def add(
    files: Annotated[list[str], typer.Argument(help="Text files, each one chunk named by its file name; - is stdin.")],
    name: Annotated[str | None, typer.Option(help="Name of the chunk; with one file only.")] = None,
    system: Annotated[bool, typer.Option("--system", help="They are system prompts (level 0).")] = False,
    anchor: Annotated[str | None, typer.Option(help="Name of the system prompt that they will stand after.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let a name move to its file's new text.")] = False,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
    model: ModelOption = _TINY,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Register text files. The same text again computes nothing."""
    from braidsdk import Braid

    if name and len(files) != 1:
        raise InputError(
            f"--name names one chunk; got {len(files)} files. Leave it out: files are named by themselves."
        )
    texts = [_read(file) for file in files]
    names = [name or (Path(file).name if file != "-" else None) for file in files]
    with Braid(model, store=store, device=device, namespace=namespace) as braid:
        _err.print(str(braid), markup=False, highlight=False)
        added = braid.register_many(texts, names=names, anchor=anchor, level=0 if system else 1, replace=replace)
        rows = [{"id": chunk.id, "name": chunk.name, "tokens": len(chunk.token_ids)} for chunk in added]
    if as_json:
        _out.print_json(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row['id']}  {row['tokens']:>6} tokens  {row['name'] or ''}")


@app.command("ls")
def list_chunks(
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
    as_json: JsonOption = False,
) -> None:
    """List the registered chunks. Loads no model."""
    from braidsdk.settings import store_folder
    from braidsdk.store import ChunkStore

    with ChunkStore(store_folder(store)) as opened:
        rows = opened.list_chunks(namespace)
    if as_json:
        _out.print_json(
            json.dumps(
                [
                    {"id": row.id, "name": row.name, "level": row.level, "text": row.text, "metadata": row.metadata}
                    for row in rows
                ]
            )
        )
        return
    table = Table("name", "level", "text", "id", box=None)
    for row in rows:
        start = " ".join(row.text[:60].split())
        cells = (row.name or "", str(row.level), start + ("…" if len(row.text) > 60 else ""), row.id[:8])
        table.add_row(*map(Text, cells))
    _out.print(table)


@app.command()
def ask(
    question: str,
    chunk: Annotated[
        list[str] | None, typer.Option("--chunk", "-c", help="Name or id of a chunk, in order. Default: all.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="exact, isolated or anchored.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens are generated.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say on stderr what came from the cache.")] = False,
    store: StoreOption = None,
    namespace: NamespaceOption = "default",
    model: ModelOption = _TINY,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer a question over registered chunks."""
    from dataclasses import asdict

    from braidsdk import Braid

    with Braid(model, store=store, device=device, namespace=namespace) as braid:
        chunks = [braid.chunks.get(each) for each in chunk] if chunk else braid.chunks.list()
        if not chunk:
            chunks.sort(key=lambda each: each.level)
        context = braid.compose(chunks, mode=mode)
        if explain:
            _err.print(f"{braid}\n{context.explain()}", markup=False, highlight=False)
        answer = context.ask(question, max_new_tokens=max_new_tokens)
    if as_json:
        _out.print_json(json.dumps(asdict(answer)))
    else:
        typer.echo(answer.text)


def _read(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read as UTF-8 text: {error}.") from None
