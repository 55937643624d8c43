"""Small TransformerConfigs for the tests of the torch backend."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

RUNTIME: dict[str, Any] = {
    "activation_func": torch.nn.functional.silu,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "transformer_impl": "local",
}
"""How Megatron-Core's modules run on a CPU: no dropout, no fused kernels."""
BASE: dict[str, Any] = RUNTIME | {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}


def dense_config(**changes: Any) -> TransformerConfig:
    """Two layers, four heads of width 8."""
    return TransformerConfig(**{**BASE, **changes})


def mla_config(**changes: Any) -> MLATransformerConfig:
    """Multi-latent attention; query and key heads of width 12, value heads of width 6."""
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
    return MLATransformerConfig(**{**BASE, "multi_latent_attention": True, "rope_type": "rope", **sizes, **changes})


def moe_config(**changes: Any) -> TransformerConfig:
    """Four experts, two for each token, and a shared one."""
    moe = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    return TransformerConfig(**{**BASE, **moe, **changes})


def delta_net_config(**changes: Any) -> TransformerConfig:
    """Linear attention with two key and four value heads; attention with a gate next to it, zero-centred norms."""
    fields = {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 0],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "attention_output_gate": True,
        "num_query_groups": 2,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "layernorm_epsilon": 1e-6,
    }
    return TransformerConfig(**{**BASE, **fields, **changes})
