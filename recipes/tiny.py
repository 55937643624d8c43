"""Models that take seconds for a few steps on a CPU, for tests and first tries. Each has two prediction depths."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import small_common


def tiny_dense_pretrain_config() -> ConfigContainer:
    """Dense, Qwen3-like: grouped-query attention, norms of queries and keys, SwiGLU, untied head."""
    cfg = small_common()
    cfg.model.update(num_layers=4, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=2)
    cfg.model.update(qk_layernorm=True, layernorm_epsilon=1e-6, seq_length=64, vocab_size=512, mtp_num_layers=2)
    return cfg


def tiny_moe_pretrain_config() -> ConfigContainer:
    """`tiny_dense` with 8 experts, 2 for each token, a shared expert, and balancing without an auxiliary loss."""
    cfg = tiny_dense_pretrain_config()
    cfg.model.update(num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=64)
    cfg.model.update(moe_shared_expert_intermediate_size=64, moe_router_score_function="sigmoid")
    cfg.model.update(moe_router_enable_expert_bias=True)
    return cfg


def tiny_mla_moe_pretrain_config() -> ConfigContainer:
    """DeepSeek-V3 in miniature: MLA with a query latent, first layer dense, sigmoid router with groups, expert bias,
    shared expert, sequence-wise balancing loss."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.update(num_query_groups=None, multi_latent_attention=True, q_lora_rank=32, kv_lora_rank=16)
    cfg.model.update(qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=16, moe_layer_freq=[0, 1, 1, 1])
    cfg.model.update(moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk_scaling_factor=2.5)
    cfg.model.update(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-4)
    return cfg


def tiny_llama_pretrain_config() -> ConfigContainer:
    """Llama 3.1 in miniature: no norm of queries and keys, positions scaled for long context, tied head."""
    cfg = tiny_dense_pretrain_config()
    cfg.model.update(qk_layernorm=False, rope_scaling=True, layernorm_epsilon=1e-5)
    cfg.model.update(share_embeddings_and_output_weights=True)
    return cfg


def tiny_mimo_pretrain_config() -> ConfigContainer:
    """MiMo-7B in miniature: biases of queries, keys and values, MTP reads the hidden state before the final norm."""
    cfg = tiny_dense_pretrain_config()
    cfg.model.update(qk_layernorm=False, add_qkv_bias=True, mtp_num_layers=1, mtp_hidden_source="pre_final_norm")
    return cfg


def tiny_mixtral_pretrain_config() -> ConfigContainer:
    """Mixtral in miniature: wide experts, a softmax over the chosen ones, a balancing loss."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.update(qk_layernorm=False, moe_ffn_hidden_size=None, moe_shared_expert_intermediate_size=None)
    _route_by_softmax(cfg)
    return cfg


def tiny_glm45_pretrain_config() -> ConfigContainer:
    """GLM-4.5 in miniature: half of each head turned, biases of queries, keys and values, first layer dense."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.update(rotary_percent=0.5, add_qkv_bias=True, moe_layer_freq=[0, 1, 1, 1])
    cfg.model.update(moe_router_topk_scaling_factor=2.5, mtp_num_layers=1)
    return cfg


def tiny_deepseek_v2_pretrain_config() -> ConfigContainer:
    """DeepSeek-V2-Lite in miniature: no query latent, a softmax over all experts, YaRN."""
    cfg = tiny_mla_moe_pretrain_config()
    cfg.model.update(q_lora_rank=None, rope_type="yarn", rotary_scaling_factor=4.0, original_max_position_embeddings=32)
    cfg.model.update(mscale=0.707, mscale_all_dim=0.707, moe_router_num_groups=None, moe_router_group_topk=None)
    cfg.model.update(moe_router_topk_scaling_factor=None)
    _route_by_softmax(cfg)
    cfg.model.moe_router_pre_softmax = True
    return cfg


def tiny_qwen3_next_pretrain_config() -> ConfigContainer:
    """Qwen3-Next in miniature: linear attention in three layers of four, gated attention, zero-centred norms."""
    cfg = tiny_moe_pretrain_config()
    cfg.model.update(attention_output_gate=True, layernorm_zero_centered_gamma=True, rotary_percent=0.25)
    cfg.model.update(experimental_attention_variant="gated_delta_net", linear_attention_freq=4, linear_num_key_heads=2)
    cfg.model.update(linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
    cfg.model.update(moe_shared_expert_gate=True, mtp_num_layers=1)
    _route_by_softmax(cfg)
    return cfg


def _route_by_softmax(cfg: ConfigContainer) -> None:
    cfg.model.update(moe_router_score_function="softmax", moe_router_enable_expert_bias=False)
    cfg.model.update(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-2)
