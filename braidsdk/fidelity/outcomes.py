"""Outcomes: what one question gave in one mode. They are kept in the store's folder, so that an interrupted run goes on
where it stopped, and a run with one mode more measures that mode alone.

An outcome is found by everything that it depends on: model, device, mode, chunks, question. A line that was cut off by
a crash is no outcome, and is measured again.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VERSION = 1  # raise it when outcomes are measured in another way

MOST_KEPT = 20_000
"""Outcomes that a store keeps; when there are more, the older half is forgotten."""


@dataclass(frozen=True)
class Outcome:
    """What one question gave in one mode.

    Attributes:
        mode: the composition rule.
        text: the answer.
        token_ids: its ids.
        kl: KL divergence of this mode's next-token distributions from full prefill's, in nats: the mean over the tokens
            of full prefill's answer.
        top1: share of these tokens at which both have the same likeliest one.
        prefix: how many tokens this answer and full prefill's begin with in common.
        budget: what the call computed of the context, as a share of computing all of it.
        first_token_ms: time to the first token. Caches are in memory, except in full prefill, which has none.
        answer_tokens: how many tokens full prefill's answer has.
    """

    mode: str
    text: str
    token_ids: tuple[int, ...]
    kl: float
    top1: float
    prefix: int
    budget: float
    first_token_ms: float
    answer_tokens: int


class Outcomes:
    """The outcomes that a store keeps."""

    def __init__(self, file: Path) -> None:
        """Read what is kept. `file` need not exist."""
        self._file = file
        self._known: dict[str, Outcome] = {}
        lines = 0
        with contextlib.suppress(OSError), file.open(encoding="utf-8", errors="replace") as opened:
            for line in opened:
                lines += bool(line.strip())
                with contextlib.suppress(TypeError, ValueError, KeyError):
                    key, fields = json.loads(line)
                    self._known[key] = Outcome(**{**fields, "token_ids": tuple(fields["token_ids"])})
        if lines > MOST_KEPT:
            self._shorten()

    def find(self, key: str) -> Outcome | None:
        """The outcome under a key that `key_of` made."""
        return self._known.get(key)

    def keep(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome at once. Where the disk does not allow it, a later run measures it again."""
        self._known[key] = outcome
        line = json.dumps([key, asdict(outcome)]) + "\n"
        with contextlib.suppress(OSError):
            file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, f"\n{line}".encode())  # in one write, behind what a crash may have cut off
            finally:
                os.close(file)

    def _shorten(self) -> None:
        newest = list(self._known.items())[-MOST_KEPT // 2 :]
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            try:
                temporary.write_text("".join(json.dumps([key, asdict(each)]) + "\n" for key, each in newest))
                temporary.replace(self._file)
            finally:
                temporary.unlink(missing_ok=True)


def key_of(*parts: object) -> str:
    """The key of an outcome that depends on these parts, JSON."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()
