"""The options that several commands share, each with its environment variable."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from braidsdk.engine.sampling import SamplingOptions

TINY = "braid-tiny"

_MODEL, _SAMPLING = "Model and store", "Sampling"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        envvar="BRAID_MODEL",
        help="braid-tiny, a checkpoint's folder, or a hub id such as Qwen/Qwen3-0.6B.",
        rich_help_panel=_MODEL,
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        envvar="BRAID_STORE",
        help="Folder of the chunk store.",
        show_default="the user's data folder",
        rich_help_panel=_MODEL,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", envvar="BRAID_DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MODEL),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        envvar="BRAID_DTYPE",
        help="auto (the checkpoint's own), float32, bfloat16 or float64.",
        rich_help_panel=_MODEL,
    ),
]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        envvar="BRAID_WEIGHTS",
        help="auto (in the dtype), or int8: half the bytes, a little less accurate; slow on torch's kernels.",
        rich_help_panel=_MODEL,
    ),
]
NamespaceOption = Annotated[
    str,
    typer.Option(
        "--namespace", envvar="BRAID_NAMESPACE", help="Only chunks of this namespace are seen.", rich_help_panel=_MODEL
    ),
]

ChunksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--chunk",
        "-c",
        help="Name, id or glob ('guide*') of the chunks to answer from, in this order; can be repeated.",
        show_default="all",
    ),
]
ModeOption = Annotated[
    str | None,
    typer.Option(
        "--mode",
        envvar="BRAID_MODE",
        help="auto, exact, isolated, anchored, or a repair such as guided(0.15)+shift.",
        show_default="auto: what braid fidelity measured, else anchored",
    ),
]
ThinkingOption = Annotated[
    bool,
    typer.Option("--thinking", envvar="BRAID_THINKING", help="Let the model think before it answers, where it can."),
]

MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        help="Generate at most this many tokens.",
        show_default="256",
        rich_help_panel=_SAMPLING,
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        help="Above 0, tokens are sampled.",
        show_default="0, greedy",
        rich_help_panel=_SAMPLING,
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p", help="Sample from the likeliest tokens up to this total probability.", rich_help_panel=_SAMPLING
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", help="Sample from this many of the likeliest tokens.", rich_help_panel=_SAMPLING),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        help="Leave out tokens below this share of the likeliest one's probability.",
        rich_help_panel=_SAMPLING,
    ),
]
PenaltyOption = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1, repeated tokens are less likely.", rich_help_panel=_SAMPLING),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same answer.", rich_help_panel=_SAMPLING)
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Stop before this text; can be repeated.", rich_help_panel=_SAMPLING),
]


def sampling(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> "SamplingOptions":
    """The keywords of `Context.ask` and `stream`."""
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
    }
