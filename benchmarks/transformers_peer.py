"""transformers on the same prompts: full prefills, questions over a ready cache, and decoding."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from timing import Row, seconds, spread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

ATTENTION: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "torch's choice": nullcontext,
    "without cuDNN": partial(
        sdpa_kernel, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    ),
}
"""Kernels of torch's attention. On a Hopper GPU torch prefers cuDNN's, which plan anew, on the host, for every new
length of the cache, so for every token."""


@torch.inference_mode()
def eager(model: torch.nn.Module, ids: Tensor, question: int, name: str) -> Iterator[Row]:
    """A prompt's full prefill, its last `question` tokens over a ready cache, and decoding after it.

    Each with both kinds of attention kernels; the faster one counts.
    """
    found: dict[str, list[Row]] = {}
    for attention, chosen in ATTENTION.items():
        with chosen():
            for what, values, unit in _timed(model, ids, question):
                found.setdefault(what, []).append({**spread(values, unit), "attention": attention})
    for what, rows in found.items():
        fastest = max if rows[0]["unit"] == "tokens/s" else min
        best = fastest(rows, key=lambda row: row["value"])
        yield {"what": f"{what}, {name}", **best, "tried": {row["attention"]: row["value"] for row in rows}}


def _timed(model: torch.nn.Module, ids: Tensor, question: int) -> list[tuple[str, list[float], str]]:
    cache = DynamicCache(config=model.config)
    kept, tokens = ids.shape[1] - question, 16

    def step(token: Tensor) -> Tensor:
        return model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def decode() -> None:
        nonlocal token
        for _ in range(tokens):
            token = step(token)

    prefills = [seconds(lambda: model(ids, logits_to_keep=1)) * 1e3 for _ in range(4)][1:]
    step(ids[:, :kept])
    questions = []
    for _ in range(5):
        questions.append(seconds(lambda: step(ids[:, kept:])) * 1e3)
        cache.crop(-question)
    token = step(ids[:, kept:])
    rates = [tokens / seconds(decode) for _ in range(4)][1:]
    return [
        ("full prefill", prefills, "ms"),
        ("question over a ready cache", questions[1:], "ms"),
        ("decode, eager", rates, "tokens/s"),
    ]


@torch.inference_mode()
def compiled(model: torch.nn.Module, ids: Tensor, slots: int) -> Row:
    """Single steps after a prompt, compiled, with a static cache of so many slots."""
    torch._dynamo.reset()
    fast = torch.compile(model.forward, mode="reduce-overhead")
    cache = StaticCache(config=model.config, max_cache_len=slots)
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    positions = iter(torch.arange(ids.shape[1], slots, device=ids.device).view(-1, 1, 1))

    def step() -> None:
        nonlocal token
        torch.compiler.cudagraph_mark_step_begin()
        logits = fast(token, past_key_values=cache, position_ids=next(positions)).logits
        token = logits[:, -1:].argmax(-1).clone()

    rates = [1 / seconds(step) for _ in range(40)][15:]
    return {"what": f"decode, compiled, static cache of {slots:,}", **spread(rates, "tokens/s")}
