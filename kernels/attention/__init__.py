"""Cascade GQA attention over the segments of paged KV memory."""

from braidsdk.kernels.attention.reference import cascade_attention

__all__ = ["cascade_attention"]
