"""What a checkpoint's tokenizer files were found to be, so that opening it again need not import transformers.

Importing transformers takes most of a second. A record holds what it made of the files: it is valid for the same files
and the same libraries alone. Checks run again over what was recorded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from braidsdk.models.fingerprints import libraries, recall, remember, stamp

_READ = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
"""Files that transformers may read beside a tokenizer.json."""


class Record:
    """The record of one checkpoint.

    Attributes:
        is_known: whether it holds what an earlier process found.
    """

    def __init__(self, folder: Path, file: Path | None) -> None:
        """Args:
        folder: the checkpoint's folder.
        file: where records are kept; None for nowhere.
        """
        self._file = file
        self._files = [path for form in _READ for path in sorted(folder.glob(form)) if path.is_file()] if file else []
        self._files += libraries("transformers", "tokenizers", "jinja2") if file else []
        self._key = stamp(self._files) if file else ""
        self._known: dict[str, Any] = (recall(file, self._key) or {}) if file else {}
        self._new: dict[str, Any] = {}
        self.is_known = bool(self._known)

    @property
    def is_kept(self) -> bool:
        """Whether what is found is written down."""
        return self._file is not None

    def once(self, what: object, find: Callable[[], Any]) -> Any:
        """What an earlier process found, or what `find` finds. This process finds the same thing as often as it asks.

        Args:
            what: what tells it from the others, JSON.
            find: finds it, as JSON.
        """
        key = xxhash.xxh3_128_hexdigest(json.dumps(what).encode())
        if key in self._known:
            return self._known[key]
        self._new[key] = found = find()
        return found

    def forget(self) -> None:
        """Keep nothing: another process would not find the same."""
        self._file = None

    def keep(self) -> None:
        """Write down what was found until now; nothing of what is found later."""
        if self._file and self._new:
            remember(self._file, self._key, self._files, self._known | self._new)
        self._file, self._new = None, {}
