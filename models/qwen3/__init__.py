"""The Qwen3 family."""

from braidsdk.models.qwen3.model import Qwen3

__all__ = ["Qwen3"]
