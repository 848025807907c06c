"""The limits of a store: how large it and its namespaces may become, and how long an entry stays that nobody uses.

They stand in `limits.json` and not in the index, so that they outlive it and people can read them.
"""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from braidsdk.errors import InputError, StoreError, shown
from braidsdk.store.files import Layout, sync_folder

WHOLE = ""
"""Stands for the whole store where a namespace is named."""


@dataclass(frozen=True)
class Limit:
    """Attributes:
    max_bytes: the most bytes that entries' files may take. None means any number.
    max_age_s: an entry that was not used for so many seconds is evicted. None means never.
    """

    max_bytes: float | None = None
    max_age_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_age_s"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 <= value < 2**63):
                raise InputError(f"{name} must be a number of at least 0, or None; got {shown(value)}.")


def read(layout: Layout) -> dict[str, Limit]:
    """The limits by namespace; `WHOLE` is the whole store's.

    Raises:
        StoreError: the file can't be read, or says something else.
    """
    try:
        found = json.loads(layout.limits.read_text())
        return {name: Limit(**limit) for name, limit in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{layout.limits} must map namespaces to max_bytes and max_age_s; it can't be read ({error}). Correct it, "
            "or delete it: then the store has no limits."
        ) from None


def write(layout: Layout, limits: dict[str, Limit]) -> None:
    """Keep limits durably. The caller holds the index's lock."""
    content: dict[str, Any] = {name: asdict(limit) for name, limit in limits.items() if limit != Limit()}
    new = layout.temporary("0" * 32)
    descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, layout.mode)
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(descriptor)
    new.replace(layout.limits)
    sync_folder(layout.root)
