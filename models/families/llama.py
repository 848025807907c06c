"""Models of Llama's architecture (Touvron et al. 2023, arXiv:2307.09288; Llama team 2024, arXiv:2407.21783), as
transformers' modeling_llama computes them: Llama 2 and 3.x, TinyLlama, SmolLM and SmolLM2; and Mistral without a
sliding window, whose modeling_mistral computes the same.
"""

from typing import Any

from braidsdk.models.config import ROPE_TYPES, Family


def _biased(config: Any) -> bool:
    return bool(config.attention_bias)


def _refused_of_llama(config: Any) -> list[str]:
    return ["biases in the MLP (mlp_bias)"] if config.mlp_bias else []


def _refused_of_mistral(config: Any) -> list[str]:
    return [] if config.sliding_window is None else [f"a sliding window of {config.sliding_window} tokens"]


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config="LlamaConfig",
    qk_norm=False,
    qkv_bias=_biased,
    out_bias=_biased,
    rope_types=(*ROPE_TYPES, "llama3"),
    refused=_refused_of_llama,
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config="MistralConfig",
    qk_norm=False,
    qkv_bias=lambda _: False,
    out_bias=lambda _: False,
    refused=_refused_of_mistral,
)
