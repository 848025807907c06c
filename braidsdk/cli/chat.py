"""`braid chat` is a conversation over registered chunks, which can change while it goes on."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module

import typer

from braidsdk.cli import options as opt
from braidsdk.cli.conversation import Conversation
from braidsdk.cli.exits import FAILED
from braidsdk.cli.opening import open_braid
from braidsdk.cli.output import Output
from braidsdk.cli.select import reading_order, select

_QUOTES = '"""'


def chat(
    out: Output,
    chunk: opt.ChunksOption = None,
    mode: opt.ModeOption = None,
    thinking: opt.ThinkingOption = False,
    max_new_tokens: opt.MaxNewTokensOption = None,
    temperature: opt.TemperatureOption = None,
    top_p: opt.TopPOption = None,
    top_k: opt.TopKOption = None,
    min_p: opt.MinPOption = None,
    repetition_penalty: opt.PenaltyOption = None,
    seed: opt.SeedOption = None,
    stop: opt.StopOption = None,
    model: opt.ModelOption = opt.TINY,
    store: opt.StoreOption = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    weights: opt.WeightsOption = "auto",
    namespace: opt.NamespaceOption = "default",
) -> None:
    """Chat over registered chunks. /help lists the commands of the conversation.

    Lines that are piped in are asked one after another; with --json each answer is a line of JSON. Ctrl-C stops an
    answer, Ctrl-D quits.
    """
    sampling = opt.sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop)
    interactive = sys.stdin.isatty()
    with open_braid(
        out,
        model=model,
        store=store,
        device=device,
        dtype=dtype,
        weights=weights,
        namespace=namespace,
        thinking=thinking,
    ) as braid:
        braid.warm_up(progress=out.shows_progress)
        chunks = reading_order(braid.chunks.list()) if chunk is None else select(braid.chunks, chunk)
        conversation = Conversation(out, braid, chunks, mode, sampling)
        out.note(f"Answers come from {conversation.described}. /help lists the commands.")
        for text in _texts(out, interactive):
            conversation.take(text)
            if conversation.ended:
                break
    if conversation.failed and not interactive:
        raise typer.Exit(FAILED)


def _texts(out: Output, interactive: bool) -> Iterator[str]:
    """The texts that are typed or piped in. Each is a line, or the lines between two lines of three quotes."""
    if interactive:
        with suppress(ImportError):
            import_module("readline")  # lets `input` edit lines and recall them
    while True:
        try:
            text = _line("> ", interactive)
            if text.strip() == _QUOTES:
                lines = []
                while (line := _line(". ", interactive)).strip() != _QUOTES:
                    lines.append(line)
                text = "\n".join(lines)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            out.say("\n/quit or Ctrl-D quits.")
            continue
        if text.strip():
            yield text.strip()


def _line(prompt: str, interactive: bool) -> str:
    """The next line without its line end.

    Raises:
        EOFError: there is none.
    """
    if interactive and sys.stdout.isatty():
        return input(prompt)
    if interactive:
        sys.stderr.write(prompt)
        sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
