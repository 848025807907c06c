"""Cascade GQA attention over the segments of paged KV memory: planned once per forward pass, run once per layer.

`reference.py` states what is computed; `cpu.py` computes it faster on a CPU, `amx.c` on one with AMX, `kernel.py` on a
GPU; `op.py` chooses. `cascade_attention_lse` also gives the log-sum-exp of each segment's scores.
"""

from braidsdk.kernels.attention.op import AttentionPlans, cascade_attention, cascade_attention_lse, plan_attention

__all__ = ["AttentionPlans", "cascade_attention", "cascade_attention_lse", "plan_attention"]
