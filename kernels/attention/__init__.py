"""Cascade GQA attention over the segments of paged KV memory: planned once per forward pass, run once per layer.

`reference.py` states what is computed; `cpu.py` computes it faster on the CPU; `op.py` chooses.
"""

from braidsdk.kernels.attention.op import AttentionPlans, cascade_attention, plan_attention

__all__ = ["AttentionPlans", "cascade_attention", "plan_attention"]
