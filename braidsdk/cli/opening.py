"""Opening what a command works on: a store alone, which is quick, or a model with it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from braidsdk.cli.exits import NotFoundError
from braidsdk.cli.output import Output
from braidsdk.settings import store_folder
from braidsdk.store import ChunkStore

if TYPE_CHECKING:
    from braidsdk import Braid


HITS, MISSES, MODEL = "hits", "misses", "model:"
"""Keys under which the SDK leaves counts, and what models are called, in a store. Spelt out here, because the modules
that write them import torch."""


@contextmanager
def open_store(store: Path | None) -> Iterator[ChunkStore]:
    """Open a store that is there, without a model.

    Raises:
        NotFoundError: it is not there.
    """
    folder = store_folder(store)
    if not folder.exists():
        raise NotFoundError(f"No store at {str(folder)!r}. `braid add FILE` makes one; --store chooses another.")
    with ChunkStore(folder) as opened:
        yield opened


@contextmanager
def open_braid(
    out: Output,
    *,
    model: str,
    store: Path | None,
    device: str,
    dtype: str,
    namespace: str,
    thinking: bool = False,
) -> Iterator["Braid"]:
    """Open a model over a store, and say so."""
    from braidsdk import Braid

    if out.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with Braid(model, store=store, device=device, dtype=dtype, namespace=namespace, thinking=thinking) as braid:
        out.note(str(braid))
        yield braid


def model_names(store: ChunkStore, weights: Iterable[str]) -> dict[str, str]:
    """What models are called, by the fingerprint of their weights: the start of that where no name is remembered."""
    keys = {each: f"{MODEL}{each}" for each in weights}
    known = store.recall(keys.values())
    return {each: known.get(key, each[:12]) for each, key in keys.items()}
