"""What only this server says of an answer, whatever API it was asked by."""

from dataclasses import asdict
from typing import Any

from braidsdk import Answer
from braidsdk.serve.answering import Running


def details_of(running: Running) -> dict[str, Any]:
    """How long an answer took, and what was asked for in `braid`."""
    answer, explanation = running.answer, running.explanation
    ours: dict[str, Any] = {"mode": running.context.mode}
    if answer.sources is not None:
        each = [(source.chunk.id or None, source.chunk.name, source.share) for source in answer.sources]
        ours["sources"] = [{"chunk": ident, "name": name, "share": share} for ident, name, share in each]
    if explanation is not None:
        ours["explanation"] = [asdict(row) for row in explanation.chunks]
    return {"timings": timings_of(answer), "braid": ours}


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
