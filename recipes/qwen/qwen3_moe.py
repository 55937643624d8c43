"""Qwen3 mixture-of-experts models with MTP layers added. Qwen3 was released without them."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def qwen3_30b_a3b_pretrain_config() -> ConfigContainer:
    """Qwen3-30B-A3B with one MTP layer, on 8 GPUs of 80 GB: TP=4 with sequence parallelism, PP=2, EP=4.

    The vocabulary is Qwen's; the tokenizer is "null" until the run names the one that made its data.

    Sources: dimensions, THUDM/slime 624b824a scripts/models/qwen3-30B-A3B.sh; router coefficient, transformers
    5.23.0 models/qwen3_moe; parallel sizes, recomputation and batch, Megatron-Bridge 067f987d
    recipes/qwen/h100/qwen3_moe.py.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.num_layers = 48
    model.hidden_size = 2048
    model.ffn_hidden_size = 6144  # of a dense layer; every layer is MoE
    model.num_attention_heads = 32
    model.num_query_groups = 4
    model.kv_channels = 128
    model.qk_layernorm = True
    model.rotary_base = 1_000_000.0
    model.layernorm_epsilon = 1e-6
    model.vocab_size = 151936

    model.num_moe_experts = 128
    model.moe_router_topk = 8
    model.moe_ffn_hidden_size = 768
    model.moe_router_load_balancing_type = "aux_loss"
    model.moe_aux_loss_coeff = 1e-3

    model.mtp_num_layers = 1
    model.mtp_loss_scaling_factor = 0.1

    model.tensor_model_parallel_size = 4
    model.sequence_parallel = True
    model.pipeline_model_parallel_size = 2
    model.expert_model_parallel_size = 4
    model.expert_tensor_parallel_size = 1
    model.recompute_granularity = "full"
    model.recompute_method = "uniform"
    model.recompute_num_layers = 1
    return cfg


def qwen3_235b_a22b_pretrain_config() -> ConfigContainer:
    """Qwen3-235B-A22B with one MTP layer, on 128 GPUs of 80 GB: TP=4 with sequence parallelism, PP=16, CP=2, EP=8.

    Sources: as `qwen3_30b_a3b_pretrain_config`, of the larger model.
    """
    cfg = qwen3_30b_a3b_pretrain_config()
    model = cfg.model
    model.num_layers = 94
    model.hidden_size = 4096
    model.ffn_hidden_size = 12288
    model.num_attention_heads = 64
    model.moe_ffn_hidden_size = 1536
    model.pipeline_model_parallel_size = 16
    model.context_parallel_size = 2
    model.expert_model_parallel_size = 8
    cfg.train.micro_batch_size = 1
    return cfg
