"""Small models whose experts one parameter holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from conftest import VOCABULARY, pico

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}


def qwen(**sizes: Any) -> nn.Module:
    fields = SIZES | {"intermediate_size": 12, "moe_intermediate_size": 12, "num_experts": 4} | sizes
    return pico("Qwen3MoeForCausalLM", **fields)


def deepseek() -> nn.Module:
    """A dense layer, and one of experts beside shared ones that are a module."""
    sizes = SIZES | {"num_key_value_heads": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    sizes |= {"n_routed_experts": 4, "intermediate_size": 12, "moe_intermediate_size": 12}
    sizes |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    del sizes["head_dim"]
    return pico("DeepseekV3ForCausalLM", **sizes, v_head_dim=8)


def mixtral() -> nn.Module:
    return pico("MixtralForCausalLM", **SIZES, intermediate_size=12, num_local_experts=4)


def gpt_oss() -> nn.Module:
    """Stored transposed: `(experts, in, out)`."""
    model = pico("GptOssForCausalLM", **SIZES, intermediate_size=12, num_local_experts=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:  # made without numbers
                parameter.zero_()
    return model
