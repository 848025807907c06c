"""Cascade GQA attention over the segments of paged KV memory: planned once per forward pass, run once per layer."""

from braidsdk.kernels.attention.plan import RequestPlan, plan_attention
from braidsdk.kernels.attention.reference import cascade_attention

__all__ = ["RequestPlan", "cascade_attention", "plan_attention"]
