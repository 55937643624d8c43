"""Qwen3-Next: linear attention in three layers of four, 512 small experts, and an MTP layer of its own."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def qwen3_next_80b_a3b_pretrain_config() -> ConfigContainer:
    """Qwen3-Next-80B-A3B with its MTP layer: PP=4, EP=8. GPUs need flash-linear-attention.

    The MTP layer has full attention with a gate and experts, as every fourth layer of the trunk.

    Sources: dimensions, transformers 5.23.0 models/qwen3_next and THUDM/slime af61a8ec scripts/models/
    qwen3-next-80B-A3B.sh; parallel sizes and loss factor, Megatron-Bridge 067f987d recipes/qwen/h100/qwen3_next.py.
    """
    cfg = pretrain_common()
    _set_architecture(cfg)
    model = cfg.model
    model.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.1, pipeline_model_parallel_size=4)
    model.update(expert_model_parallel_size=8, recompute_granularity="full", recompute_method="uniform")
    model.update(recompute_num_layers=1)
    cfg.train.update(global_batch_size=1024, micro_batch_size=1)
    return cfg


def _set_architecture(cfg: ConfigContainer) -> None:
    model = cfg.model
    model.update(num_layers=48, hidden_size=2048)
    model.ffn_hidden_size = 5120  # of a dense layer; every layer is MoE
    model.update(num_attention_heads=16, num_query_groups=2, kv_channels=256, qk_layernorm=True)
    model.update(attention_output_gate=True, rotary_base=10_000_000.0, rotary_percent=0.25, layernorm_epsilon=1e-6)
    model.update(layernorm_zero_centered_gamma=True, vocab_size=151936)

    model.update(experimental_attention_variant="gated_delta_net", linear_attention_freq=4, linear_conv_kernel_dim=4)
    model.update(linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32)

    model.update(num_moe_experts=512, moe_router_topk=10, moe_ffn_hidden_size=512)
    model.update(moe_shared_expert_intermediate_size=512, moe_shared_expert_gate=True)
    model.update(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-3)
