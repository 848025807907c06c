"""`braid serve` serves a model over HTTP."""

import os
from pathlib import Path
from typing import Annotated

import typer

from braidsdk.cli import options as opt
from braidsdk.cli.opening import open_braid
from braidsdk.cli.output import Output
from braidsdk.errors import BraidError, InputError

ENVIRONMENT = "BRAID_API_KEYS"
"""The variable that holds API keys."""


def serve(
    out: Output,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar=ENVIRONMENT,
            help="A key that clients must send, or KEY=NAMESPACE; can be repeated. In the variable, spaces between.",
            show_default="none: everybody who reaches the port may ask",
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option(
            "--served-name", help="What clients call the model.", show_default="the model, or its folder's name"
        ),
    ] = None,
    max_body_mb: Annotated[
        float, typer.Option("--max-body-mb", min=0.001, max=4096, help="Largest body of a request.")
    ] = 8.0,
    default_tokens: Annotated[
        int, typer.Option("--default-tokens", min=1, help="Longest answer where a client names no limit.")
    ] = 1024,
    thinking: opt.ThinkingOption = False,
    model: opt.ModelOption = opt.TINY,
    store: opt.StoreOption = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    weights: opt.WeightsOption = "auto",
    namespace: opt.NamespaceOption = "default",
) -> None:
    """Serve a model over HTTP: OpenAI's chat API, Anthropic's Messages API, and one for chunks.

    SIGTERM lets running answers end; a second one ends them. Needs the extra: pip install "braidsdk[serve]".
    """
    try:
        from braidsdk.serve import LOOPBACK, Settings, create_app, run
    except ModuleNotFoundError as error:
        raise BraidError(
            f'`braid serve` needs {error.name}, which is not installed. pip install "braidsdk[serve]"'
        ) from error
    keys = dict(key_of(each, namespace) for each in api_key or ())
    if not keys and ENVIRONMENT in os.environ:
        raise InputError(f"{ENVIRONMENT} must hold at least one key; got none. Unset it to serve without keys.")
    is_local = host in ("127.0.0.1", "localhost", "::1")
    settings = Settings(
        name=served_name or (Path(model).name if Path(model).exists() else model),
        namespace=namespace,
        keys=keys,
        max_body_bytes=int(max_body_mb * 2**20),
        default_tokens=default_tokens,
        hosts=LOOPBACK if is_local and not keys else (),
    )
    if not is_local and not keys:
        out.warn(f"Everybody who reaches {host} may read and change chunks. --api-key asks for a key.")

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
        run(
            create_app(braid, settings),
            host,
            port,
            lambda url: out.note(f"Listening on {url}/v1 (model {settings.name!r})."),
        )


def key_of(given: str, namespace: str) -> tuple[str, str]:
    """A key and its namespace, which stands behind the last equals sign if there is one: keys may hold some."""
    key, equals, of = given.rpartition("=")
    return (key, of) if equals else (given, namespace)
