"""Digests of which few bits are left: different keys then share one all the time, and no answer may come from another
key's entry."""

from pathlib import Path

import pytest
import torch
import xxhash

from braidsdk import Braid
from braidsdk.store import keys

RULES = "You answer questions from the documents."
TEXTS = [f"The number of house {number} is {number * 37 % 101}." for number in range(12)]
ORDERS = ([0, 1, 2], [2, 1, 0], [5, 3, 8, 1], [11, 10], [7, 4, 6, 9], [3, 5])


def cut(record_json: str, token_bytes: bytes) -> str:
    return f"{xxhash.xxh3_64_intdigest(record_json.encode() + token_bytes) % 8:032x}"


def logits(model: Path, store: Path) -> list[torch.Tensor]:
    """After a question over several orders of the same chunks, twice: entries are computed, found in memory, and read
    from the store."""
    found = []
    for _ in range(2):
        with Braid(model, store=store, device="cpu", dtype="float32") as braid:
            rules = braid.register_system(RULES)
            chunks = braid.register_many(TEXTS, anchor=rules, progress=False)
            for mode in ("anchored", "exact"):
                for order in ORDERS:
                    context = braid.compose([rules, *(chunks[at] for at in order)], mode=mode)
                    found.append(context.next_token_logits("Which number has house 5?"))
    return found


def test_no_answer_comes_from_another_keys_entry(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = logits(random_checkpoint, tmp_path / "whole")
    monkeypatch.setattr(keys, "digest_of", cut)
    for got, wanted in zip(logits(random_checkpoint, tmp_path / "cut"), right, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
