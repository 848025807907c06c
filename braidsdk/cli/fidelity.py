"""`braid fidelity` measures how close composition modes come to full prefill, on one's own documents and questions."""

import re
from pathlib import Path
from typing import Annotated

import typer

from braidsdk.cli import options as opt
from braidsdk.cli.exits import NotFoundError
from braidsdk.cli.opening import open_braid
from braidsdk.cli.output import Output
from braidsdk.cli.select import reading_order, select

_COMMA = re.compile(r",(?![^(]*\))")
"""A comma that does not stand between parentheses, where a mode's parameters are."""


def fidelity(
    out: Output,
    questions: Annotated[Path, typer.Option("--questions", metavar="FILE", help="JSON or JSON lines with questions.")],
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--modes", "-m", help="Modes, with commas between them; can be repeated.", show_default="anchored"
        ),
    ] = None,
    chunk: opt.ChunksOption = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Ask so many of the questions.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the sample, and what the intervals are made of.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Generate at most this many tokens.")
    ] = 64,
    not_found: Annotated[
        list[str] | None,
        typer.Option(
            "--not-found",
            help="A phrase that says that it is not in the documents; can be repeated.",
            show_default="a short list",
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First find how guided chooses best in this model.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw quality against cost: .png, .svg or .pdf.")
    ] = None,
    thinking: opt.ThinkingOption = False,
    model: opt.ModelOption = opt.TINY,
    store: opt.StoreOption = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    weights: opt.WeightsOption = "auto",
    namespace: opt.NamespaceOption = "default",
) -> None:
    """Measure how close modes come to full prefill, on your documents and questions.

    Each question is answered in full prefill (mode "exact") and in each mode. A question may bring passages of its own;
    see the page on quality for the file's form and what each row means. An interrupted run goes on where it stopped.
    Answers then carry what was measured, and `braid show` lists it.
    """
    from braidsdk.fidelity.questions import read_questions

    if not questions.exists():
        raise NotFoundError(f"{questions} can't be read: it does not exist. Check the path.")
    asked = read_questions(questions)
    named = [mode.strip() for given in modes for mode in _COMMA.split(given)] if modes else None
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
        report = braid.fidelity(
            reading_order(braid.chunks.list()) if chunk is None else select(braid.chunks, chunk),
            asked,
            named,
            sample=sample,
            seed=seed,
            max_new_tokens=max_new_tokens,
            not_found=not_found,
            calibrate=calibrate,
            progress=out.shows_progress,
        )
    if out.json:
        out.document(report.to_dict())
    else:
        out.text(str(report))
    if plot is not None:
        report.plot(plot)
        out.note(f"The plot is in {plot}.")
