"""BraidSDK: composable context caching for Qwen3, Qwen2.5 and Llama-architecture models.

Register documents once, compose their KV caches in any order, and answer without prefilling them again::

    from braidsdk import Braid

    with Braid("braid-tiny", store="my-store") as braid:
        rules = braid.register_system("You answer questions from the documents.")
        doc = braid.register("The capital of Aistonia is Flubarg.", anchor=rules)
        print(braid.ask("What is the capital of Aistonia?", chunks=[rules, doc]).text)

Names load on first use, so that importing the package (or `braidsdk.store` alone) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from braidsdk import errors, logs
from braidsdk.errors import BraidError

if TYPE_CHECKING:
    from braidsdk.answer import AsyncStream, Stream
    from braidsdk.braid import Braid
    from braidsdk.compose.auto import Auto
    from braidsdk.compose.repairs import Blended, Guided, Linked
    from braidsdk.context import Context
    from braidsdk.fidelity.report import FidelityReport
    from braidsdk.model_kernels import Kernels
    from braidsdk.types import (
        Answer,
        Certificate,
        Chunk,
        ChunkVersion,
        EntryGroup,
        ExplainedChunk,
        Explanation,
        Inline,
        Progress,
        Registered,
        RegistrationEstimate,
        Skipped,
        Source,
        Stats,
        Timings,
        TokenSources,
        Usage,
    )

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncStream",
    "Auto",
    "Blended",
    "Braid",
    "BraidError",
    "Certificate",
    "Chunk",
    "ChunkVersion",
    "Context",
    "EntryGroup",
    "ExplainedChunk",
    "Explanation",
    "FidelityReport",
    "Guided",
    "Inline",
    "Kernels",
    "Linked",
    "Progress",
    "Registered",
    "RegistrationEstimate",
    "Skipped",
    "Source",
    "Stats",
    "Stream",
    "Timings",
    "TokenSources",
    "Usage",
    "errors",
]

_HOME = {
    "AsyncStream": "braidsdk.answer",
    "Auto": "braidsdk.compose.auto",
    "Blended": "braidsdk.compose.repairs",
    "Braid": "braidsdk.braid",
    "Context": "braidsdk.context",
    "FidelityReport": "braidsdk.fidelity.report",
    "Guided": "braidsdk.compose.repairs",
    "Kernels": "braidsdk.model_kernels",
    "Linked": "braidsdk.compose.repairs",
    "Stream": "braidsdk.answer",
    **dict.fromkeys(
        (
            "Answer",
            "Certificate",
            "Chunk",
            "ChunkVersion",
            "EntryGroup",
            "ExplainedChunk",
            "Explanation",
            "Inline",
            "Progress",
            "Registered",
            "RegistrationEstimate",
            "Skipped",
            "Source",
            "Stats",
            "Timings",
            "TokenSources",
            "Usage",
        ),
        "braidsdk.types",
    ),
}

logs.configure()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
