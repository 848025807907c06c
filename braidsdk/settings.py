"""Defaults that come from the environment."""

import os
from pathlib import Path

import platformdirs


def store_folder(store: str | Path | None) -> Path:
    """The store's folder. None means `BRAID_STORE`, or the user's data folder."""
    chosen = store or os.environ.get("BRAID_STORE") or platformdirs.user_data_path("braidsdk") / "store"
    return Path(chosen).expanduser()


def index_folder() -> str | None:
    """The folder that keeps the indexes of stores on network file systems: `BRAID_INDEX`. None means that each store
    keeps its own."""
    return os.environ.get("BRAID_INDEX") or None


def checks_itself() -> bool:
    """Whether the engine checks pages, slots and pins when it is idle. `BRAID_CHECK=1` turns this on, for debugging."""
    return os.environ.get("BRAID_CHECK", "") not in ("", "0")
