"""Qwen2 and Qwen2.5 (Qwen team 2024, arXiv:2412.15115): dense models, as transformers' modeling_qwen2 computes them.

QKV projections always have biases, the output projection never has one. Qwen2.5-Coder and -Math are of this family;
Qwen2-MoE and -VL are others.
"""

from braidsdk.models.config import Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    config="Qwen2Config",
    qk_norm=False,
    qkv_bias=lambda _: True,
    out_bias=lambda _: False,
)
