"""Qwen3 mixture-of-experts models with MTP layers added. Qwen3 was released without them."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def qwen3_30b_a3b_pretrain_config() -> ConfigContainer:
    """Qwen3-30B-A3B with one MTP layer: TP=4 with sequence parallelism, PP=2, EP=4.

    The vocabulary is Qwen's; the tokenizer is "null" until the run names the one that made its data.

    Sources: dimensions, THUDM/slime 624b824a scripts/models/qwen3-30B-A3B.sh; router coefficient, transformers
    5.23.0 models/qwen3_moe; parallel sizes, recomputation and batch, Megatron-Bridge 067f987d
    recipes/qwen/h100/qwen3_moe.py.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.update(num_layers=48, hidden_size=2048)
    model.ffn_hidden_size = 6144  # of a dense layer; every layer is MoE
    model.update(num_attention_heads=32, num_query_groups=4, kv_channels=128, qk_layernorm=True)
    model.update(rotary_base=1_000_000.0, layernorm_epsilon=1e-6, vocab_size=151936)

    model.update(num_moe_experts=128, moe_router_topk=8, moe_ffn_hidden_size=768)
    model.update(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-3)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)

    model.update(tensor_model_parallel_size=4, sequence_parallel=True, pipeline_model_parallel_size=2)
    model.update(expert_model_parallel_size=4, expert_tensor_parallel_size=1, recompute_granularity="full")
    model.update(recompute_method="uniform", recompute_num_layers=1)
    return cfg


def qwen3_235b_a22b_pretrain_config() -> ConfigContainer:
    """Qwen3-235B-A22B with one MTP layer: TP=4 with sequence parallelism, PP=16, CP=2, EP=8.

    Sources: as `qwen3_30b_a3b_pretrain_config`, of the larger model.
    """
    cfg = qwen3_30b_a3b_pretrain_config()
    model = cfg.model
    model.update(num_layers=94, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=64)
    model.update(moe_ffn_hidden_size=1536, pipeline_model_parallel_size=16, context_parallel_size=2)
    model.update(expert_model_parallel_size=8)
    cfg.train.micro_batch_size = 1
    return cfg
