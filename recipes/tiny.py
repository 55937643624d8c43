"""Models that take seconds for a few steps on a CPU, for tests and first tries. Each has two prediction depths."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import small_common


def tiny_dense_pretrain_config() -> ConfigContainer:
    """Dense, Qwen3-like: grouped-query attention, norms of queries and keys, SwiGLU, untied head."""
    cfg = small_common()
    cfg.model.num_layers = 4
    cfg.model.hidden_size = 64
    cfg.model.ffn_hidden_size = 192
    cfg.model.num_attention_heads = 4
    cfg.model.num_query_groups = 2
    cfg.model.qk_layernorm = True
    cfg.model.layernorm_epsilon = 1e-6
    cfg.model.seq_length = 64
    cfg.model.vocab_size = 512
    cfg.model.mtp_num_layers = 2
    return cfg


def tiny_moe_pretrain_config() -> ConfigContainer:
    """`tiny_dense` with 8 experts, 2 for each token, a shared expert, and balancing without an auxiliary loss."""
    cfg = tiny_dense_pretrain_config()
    cfg.model.num_moe_experts = 8
    cfg.model.moe_router_topk = 2
    cfg.model.moe_ffn_hidden_size = 64
    cfg.model.moe_shared_expert_intermediate_size = 64
    cfg.model.moe_router_score_function = "sigmoid"
    cfg.model.moe_router_enable_expert_bias = True
    return cfg


def tiny_mla_moe_pretrain_config() -> ConfigContainer:
    """DeepSeek-V3 in miniature: MLA with a query latent, first layer dense, sigmoid router with groups, expert bias,
    shared expert, sequence-wise balancing loss."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.num_query_groups = None
    cfg.model.multi_latent_attention = True
    cfg.model.q_lora_rank = 32
    cfg.model.kv_lora_rank = 16
    cfg.model.qk_head_dim = 16
    cfg.model.qk_pos_emb_head_dim = 8
    cfg.model.v_head_dim = 16
    cfg.model.moe_layer_freq = [0, 1, 1, 1]
    cfg.model.moe_router_num_groups = 4
    cfg.model.moe_router_group_topk = 2
    cfg.model.moe_router_topk_scaling_factor = 2.5
    cfg.model.moe_router_load_balancing_type = "seq_aux_loss"
    cfg.model.moe_aux_loss_coeff = 1e-4
    return cfg


def tiny_llama_pretrain_config() -> ConfigContainer:
    """Llama 3.1 in miniature: no norm of queries and keys, positions scaled for long context, tied head."""
    cfg = tiny_dense_pretrain_config()
    cfg.model.qk_layernorm = False
    cfg.model.rope_scaling = True
    cfg.model.layernorm_epsilon = 1e-5
    cfg.model.share_embeddings_and_output_weights = True
    return cfg


def tiny_mimo_pretrain_config() -> ConfigContainer:
    """MiMo-7B in miniature: biases of queries, keys and values."""
    cfg = tiny_dense_pretrain_config()
    cfg.model.qk_layernorm = False
    cfg.model.add_qkv_bias = True
    cfg.model.mtp_num_layers = 1
    return cfg


def tiny_mixtral_pretrain_config() -> ConfigContainer:
    """Mixtral in miniature: wide experts, a softmax over the chosen ones, a balancing loss."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.qk_layernorm = False
    cfg.model.moe_ffn_hidden_size = None
    cfg.model.moe_shared_expert_intermediate_size = None
    _route_by_softmax(cfg)
    return cfg


def tiny_glm45_pretrain_config() -> ConfigContainer:
    """GLM-4.5 in miniature: half of each head turned, biases of queries, keys and values, first layer dense."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.rotary_percent = 0.5
    cfg.model.add_qkv_bias = True
    cfg.model.moe_layer_freq = [0, 1, 1, 1]
    cfg.model.moe_router_topk_scaling_factor = 2.5
    cfg.model.mtp_num_layers = 1
    return cfg


def tiny_deepseek_v2_pretrain_config() -> ConfigContainer:
    """DeepSeek-V2-Lite in miniature: no query latent, a softmax over all experts, YaRN."""
    cfg = tiny_mla_moe_pretrain_config()
    cfg.model.q_lora_rank = None
    cfg.model.rope_type = "yarn"
    cfg.model.rotary_scaling_factor = 4.0
    cfg.model.original_max_position_embeddings = 32
    cfg.model.mscale = cfg.model.mscale_all_dim = 0.707
    cfg.model.moe_router_num_groups = cfg.model.moe_router_group_topk = None
    cfg.model.moe_router_topk_scaling_factor = None
    _route_by_softmax(cfg)
    cfg.model.moe_router_pre_softmax = True
    return cfg


def tiny_qwen3_next_pretrain_config() -> ConfigContainer:
    """Qwen3-Next in miniature: linear attention in three layers of four, gated attention, zero-centred norms."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.attention_output_gate = True
    cfg.model.layernorm_zero_centered_gamma = True
    cfg.model.rotary_percent = 0.25
    cfg.model.experimental_attention_variant = "gated_delta_net"
    cfg.model.linear_attention_freq = 4
    cfg.model.linear_num_key_heads = 2
    cfg.model.linear_num_value_heads = 4
    cfg.model.linear_key_head_dim = cfg.model.linear_value_head_dim = 16
    cfg.model.moe_shared_expert_gate = True
    cfg.model.mtp_num_layers = 1
    _route_by_softmax(cfg)
    return cfg


def _route_by_softmax(cfg: ConfigContainer) -> None:
    cfg.model.moe_router_score_function = "softmax"
    cfg.model.moe_router_enable_expert_bias = False
    cfg.model.moe_router_load_balancing_type = "seq_aux_loss"
    cfg.model.moe_aux_loss_coeff = 1e-2
