"""What every API tells of an answer besides its text: where tokens came from, how long it took."""

from dataclasses import asdict
from typing import Any

from braidsdk import Answer, Usage
from braidsdk.serve.answering import Running


def cache_counts(answer: Answer, written: int) -> dict[str, int]:
    """How many tokens of a prompt were read from the cache and written to it, in OpenAI's words.

    Args:
        answer: the answer.
        written: tokens that were stored before it was asked for.
    """
    usage = answer.usage
    return {"cached_tokens": usage.cached_tokens, "cache_write_tokens": usage.stored_tokens + written}


def origins(usage: Usage) -> dict[str, int]:
    """Where the prompt's tokens came from. The counts add up to all of them."""
    return {
        "exact": usage.exact_tokens,
        "composed": usage.cached_tokens - usage.exact_tokens,
        "repaired": usage.repaired_tokens,
        "computed": usage.computed_tokens,
    }


def ours(running: Running) -> dict[str, Any]:
    """What only this server says: how long it took, and what was asked for in `braid`."""
    answer, explanation = running.answer, running.explanation
    found: dict[str, Any] = {"mode": running.context.mode}
    if answer.sources is not None:
        each = [(source.chunk.id or None, source.chunk.name, source.share) for source in answer.sources]
        found["sources"] = [{"chunk": ident, "name": name, "share": share} for ident, name, share in each]
    if explanation is not None:
        found["explanation"] = [asdict(row) for row in explanation.chunks]
    return {"timings": timings_of(answer), "braid": found}


def timings_of(answer: Answer) -> dict[str, Any]:
    """How long it took, in the words of llama.cpp's server."""
    timings, usage = answer.timings, answer.usage
    rate = timings.decode_tokens_per_s
    predicted_ms = (usage.completion_tokens - 1) / rate * 1e3 if rate else 0.0
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": usage.computed_tokens + usage.repaired_tokens,
        "prompt_ms": timings.prefill_ms,
        "load_ms": timings.load_ms,
        "first_token_ms": timings.first_token_ms,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_second": rate,
    }
