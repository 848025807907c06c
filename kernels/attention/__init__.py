"""Cascade GQA attention over the segments of paged KV memory: planned once per forward pass, run once per layer.

`reference.py` states what is computed; `eager.py` computes it by torch, `native.py` by C kernels, `launch.py` and
`kernel.py` by Triton. `cascade_attention_lse` also gives the log-sum-exp of each segment's scores.
"""

from braidsdk.kernels.attention.op import cascade_attention, cascade_attention_lse, plan_attention
from braidsdk.kernels.attention.plan import Plan

__all__ = ["Plan", "cascade_attention", "cascade_attention_lse", "plan_attention"]
