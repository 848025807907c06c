"""Qwen3 (Qwen team 2025, arXiv:2505.09388): dense models, as transformers' modeling_qwen3 computes them."""

from typing import Any

from braidsdk.models.config import Family


def _biased(config: Any) -> bool:
    return bool(config.attention_bias)


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    config="Qwen3Config",
    qk_norm=True,
    qkv_bias=_biased,
    out_bias=_biased,
)
