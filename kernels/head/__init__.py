"""The end of a model: final norm, LM head, and the greedy choice of a token."""

from braidsdk.kernels.head.op import greedy, norm_head

__all__ = ["greedy", "norm_head"]
