"""`braid ask` answers one question over registered chunks."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from braidsdk.cli import options as opt
from braidsdk.cli.opening import open_braid
from braidsdk.cli.output import Output, as_json, one_line, prints_unicode
from braidsdk.cli.select import reading_order, select
from braidsdk.cli.sources import STDIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from braidsdk import Answer, Context, Source
    from braidsdk.engine.sampling import SamplingOptions

_BAR = 24
"""Columns that a share of 100 % takes."""


def ask(
    out: Output,
    question: Annotated[str, typer.Argument(help="The question, or - to read it from stdin.")],
    chunk: opt.ChunksOption = None,
    mode: opt.ModeOption = None,
    thinking: opt.ThinkingOption = False,
    stream: Annotated[bool, typer.Option("--stream", "-s", help="Print the answer as it arrives.")] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show what comes from the cache, before the answer and after it."),
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Show which chunks the answer paid attention to, after it.")
    ] = False,
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
    """Answer a question over registered chunks.

    --json prints the answer with its token ids, counts and times, and with --sources the share of each chunk in the
    whole answer and in each token. --stream --json prints JSON lines: one for each piece, then one with the whole
    answer.
    """
    if question == STDIN:
        question = sys.stdin.read()
    sampling = opt.sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop)
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
        chunks = reading_order(braid.chunks.list()) if chunk is None else select(braid.chunks, chunk)
        if not chunks:
            out.warn(f"no chunks in namespace {namespace!r}: the model answers without context. `braid add` adds some.")
        context = braid.compose(chunks, mode=mode)
        explanation = context.explain() if explain else None
        if explanation and not out.json:
            out.say(str(explanation))
        if stream:
            answer = _stream(out, context, question, sources, sampling)
        else:
            answer = context.ask(question, sources=sources, **sampling)
    document = {**as_json(answer), **({"explanation": asdict(explanation)} if explanation else {})}
    if out.json:
        (out.json_line if stream else out.document)({"answer": document} if stream else document)
    elif not stream:
        out.text(answer.text)
    if explanation and not out.json:
        out.say(explanation.beside(answer))
    if answer.sources is not None and not out.json:
        out.say(_bars(answer.sources))


def _bars(sources: "Sequence[Source]") -> str:
    """A line for each document: its share as a bar and in percent, and its name."""
    if not sources:
        return "  no documents"
    block = "█" if prints_unicode(sys.stderr) else "#"
    return "\n".join(
        f"  {block * round(_BAR * source.share):<{_BAR}} {source.share:>6.1%}  {one_line(source.chunk.label)}"
        for source in sources
    )


def _stream(out: Output, context: "Context", question: str, sources: bool, sampling: "SamplingOptions") -> "Answer":
    with context.stream(question, sources=sources, **sampling) as pieces:
        for piece in pieces:
            if out.json:
                out.json_line({"piece": piece})
            else:
                out.piece(piece)
        if not out.json:
            out.text("")
        return pieces.answer
