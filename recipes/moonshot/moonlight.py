"""Moonshot AI's models with DeepSeek-V3's architecture, with an MTP layer added: Moonlight and Kimi-K2."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.deepseek.deepseek_v3 import deepseek_v3_architecture


def moonlight_16b_a3b_pretrain_config() -> ConfigContainer:
    """Moonlight-16B-A3B with one MTP layer at 8K, on 8 GPUs of 80 GB: TP=2 with sequence parallelism, EP=8.

    The report trains with Muon, whose updates it scales to the size of AdamW's, and found no benefit of MTP for this
    model's own predictions. Its learning rate is used with AdamW here.

    Sources: arXiv 2502.16982 (dimensions, learning rate, tokens, appendix C on MTP); THUDM/slime 624b824a
    scripts/models/moonlight.sh; parallel sizes, Megatron-Bridge 067f987d recipes/moonlight/h100/moonlight_16b.py.
    """
    cfg = deepseek_v3_architecture()
    model = cfg.model
    model.num_layers = 27
    model.hidden_size = 2048
    model.ffn_hidden_size = 11264
    model.num_attention_heads = 16
    model.q_lora_rank = None
    model.rotary_base = 50_000.0
    model.layernorm_epsilon = 1e-5
    model.latent_norm_epsilon = 1e-6
    model.init_method_std = 0.02
    model.vocab_size = 163840
    model.seq_length = 8192
    model.num_moe_experts = 64
    model.moe_layer_freq = [0] + [1] * 26
    model.moe_ffn_hidden_size = 1408
    model.moe_shared_expert_intermediate_size = 2816
    model.moe_router_topk = 6
    _without_groups(cfg, scaling=2.446)

    model.tensor_model_parallel_size = 2
    model.sequence_parallel = True
    model.expert_model_parallel_size = 8
    model.expert_tensor_parallel_size = 1
    model.recompute_granularity = "selective"
    cfg.train.train_iters = None
    cfg.train.train_tokens = "5.7T"
    cfg.train.global_batch_size = 2048
    cfg.train.micro_batch_size = 1
    cfg.optimizer.lr = 4.2e-4
    cfg.optimizer.min_lr = 4.2e-5
    cfg.scheduler.lr_warmup_iters = 2000
    return cfg


def kimi_k2_pretrain_config() -> ConfigContainer:
    """Kimi-K2 (1.04T, 32B active) with one MTP layer at 4K, on 512 GPUs of 80 GB: TP=2 with sequence parallelism,
    PP=16, EP=32.

    The report trains with MuonClip; AdamW with its learning rate is used here.

    Sources: dimensions, THUDM/slime 624b824a scripts/models/kimi-k2.sh; learning rate, tokens and batch, arXiv
    2507.20534, section 2; parallel sizes, Megatron-Bridge 067f987d recipes/kimi/h100/kimi_k2.py.
    """
    cfg = deepseek_v3_architecture()
    model = cfg.model
    model.num_attention_heads = 64
    model.rotary_base = 50_000.0
    model.vocab_size = 163840
    model.num_moe_experts = 384
    model.moe_layer_freq = [0] + [1] * 60
    _without_groups(cfg, scaling=2.827)

    model.tensor_model_parallel_size = 2
    model.sequence_parallel = True
    model.pipeline_model_parallel_size = 16
    model.expert_model_parallel_size = 32
    model.expert_tensor_parallel_size = 1
    model.recompute_granularity = "selective"
    cfg.train.train_iters = None
    cfg.train.train_tokens = "15.5T"
    cfg.train.global_batch_size = 16384
    cfg.train.micro_batch_size = 1
    cfg.optimizer.lr = 2e-4
    cfg.optimizer.min_lr = 2e-5
    cfg.scheduler.lr_warmup_iters = 0
    cfg.scheduler.lr_warmup_tokens = 500 * 16384 * 4096
    cfg.scheduler.lr_decay_style = "WSD"
    cfg.scheduler.lr_wsd_decay_style = "cosine"
    cfg.scheduler.lr_decay_tokens = "15.5T"
    cfg.scheduler.lr_wsd_decay_tokens = "5.5T"
    return cfg


def _without_groups(cfg: ConfigContainer, scaling: float) -> None:
    """Every expert may be chosen; one MTP layer with DeepSeek-V3's first loss factor."""
    cfg.model.moe_router_num_groups = None
    cfg.model.moe_router_group_topk = None
    cfg.model.moe_router_topk_scaling_factor = scaling
    cfg.model.mtp_loss_scaling_factor = 0.3
