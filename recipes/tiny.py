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
