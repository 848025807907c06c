"""RMSNorm, QKV projection, QK-norm, RoPE on the keys and KV append, as one operation."""

from braidsdk.kernels.norm_qkv.op import norm_qkv
from braidsdk.kernels.norm_qkv.reference import NormQKVWeights

__all__ = ["NormQKVWeights", "norm_qkv"]
