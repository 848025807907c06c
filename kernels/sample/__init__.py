"""The choice of a token from its logits, drawn or greedy, each row in its own way."""

from braidsdk.kernels.sample.op import sample
from braidsdk.kernels.sample.reference import Choices

__all__ = ["Choices", "sample"]
