"""Opens what a command works on: only a store, which is quick, or a store with a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from braidsdk.cli.exits import NotFoundError
from braidsdk.cli.output import Output
from braidsdk.settings import index_folder, store_folder
from braidsdk.store import ChunkStore

if TYPE_CHECKING:
    from braidsdk import Braid


MODEL = "model:"
"""Under which the SDK remembers names of models in a store. It is repeated here, because the module that writes them
imports torch."""


def existing_store(store: Path | None) -> Path:
    """The folder of a store that exists.

    Raises:
        NotFoundError: it does not exist.
    """
    folder = store_folder(store)
    if not folder.exists():
        raise NotFoundError(f"No store at {str(folder)!r}. `braid add FILE` makes one; --store chooses another.")
    return folder


@contextmanager
def open_store(store: Path | None) -> Iterator[ChunkStore]:
    """Open a store that exists, without a model. Raises the same errors as `existing_store`."""
    with ChunkStore(existing_store(store), index=index_folder()) as opened:
        yield opened


@contextmanager
def open_braid(
    out: Output,
    *,
    model: str,
    store: Path | None,
    device: str,
    dtype: str,
    weights: str,
    namespace: str,
    thinking: bool = False,
) -> Iterator["Braid"]:
    """Open a model over a store, and report that on stderr."""
    from braidsdk import Braid

    if out.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with Braid(
        model, store=store, device=device, dtype=dtype, weights=weights, namespace=namespace, thinking=thinking
    ) as braid:
        out.note(str(braid))
        yield braid


def model_names(store: ChunkStore, weights: Iterable[str]) -> dict[str, str]:
    """The names of models, by the fingerprint of their weights. Without a name it is the start of the fingerprint."""
    keys = {each: f"{MODEL}{each}" for each in weights}
    known = store.recall(keys.values())
    return {each: known.get(key, each[:12]) for each, key in keys.items()}
