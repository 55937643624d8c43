"""Moonshot AI's models with DeepSeek-V3's architecture, with an MTP layer added: Moonlight and Kimi-K2."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.deepseek.deepseek_v3 import deepseek_v3_architecture


def moonlight_16b_a3b_pretrain_config() -> ConfigContainer:
    """Moonlight-16B-A3B with one MTP layer at 8K: TP=2 with sequence parallelism, EP=8.

    The report trains with Muon, whose updates it scales to the size of AdamW's, and found no benefit of MTP for this
    model's own predictions. Its learning rate is used with AdamW here.

    Sources: arXiv 2502.16982 (dimensions, learning rate, tokens, appendix C on MTP); THUDM/slime 624b824a
    scripts/models/moonlight.sh; parallel sizes, Megatron-Bridge 067f987d recipes/moonlight/h100/moonlight_16b.py.
    """
    cfg = deepseek_v3_architecture()
    model = cfg.model
    model.update(num_layers=27, hidden_size=2048, ffn_hidden_size=11264, num_attention_heads=16, q_lora_rank=None)
    model.update(rotary_base=50_000.0, layernorm_epsilon=1e-5, latent_norm_epsilon=1e-6, init_method_std=0.02)
    model.update(vocab_size=163840, seq_length=8192, num_moe_experts=64, moe_layer_freq=[0] + [1] * 26)
    model.update(moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=2816, moe_router_topk=6)
    _without_groups(cfg, scaling=2.446)

    model.update(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=8)
    model.update(expert_tensor_parallel_size=1, recompute_granularity="selective")
    cfg.train.update(train_iters=None, train_tokens="5.7T", global_batch_size=2048, micro_batch_size=1)
    cfg.optimizer.update(lr=4.2e-4, min_lr=4.2e-5)
    cfg.scheduler.lr_warmup_iters = 2000
    return cfg


def kimi_k2_pretrain_config() -> ConfigContainer:
    """Kimi-K2 (1.04T, 32B active) with one MTP layer at 4K: TP=2 with sequence parallelism,
    PP=16, EP=32.

    The report trains with MuonClip; AdamW with its learning rate is used here.

    Sources: dimensions, THUDM/slime 624b824a scripts/models/kimi-k2.sh; learning rate, tokens and batch, arXiv
    2507.20534, section 2; parallel sizes, Megatron-Bridge 067f987d recipes/kimi/h100/kimi_k2.py.
    """
    cfg = deepseek_v3_architecture()
    model = cfg.model
    model.update(num_attention_heads=64, rotary_base=50_000.0, vocab_size=163840, num_moe_experts=384)
    model.update(moe_layer_freq=[0] + [1] * 60)
    _without_groups(cfg, scaling=2.827)

    model.update(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=16)
    model.update(expert_model_parallel_size=32, expert_tensor_parallel_size=1, recompute_granularity="selective")
    cfg.train.update(train_iters=None, train_tokens="15.5T", global_batch_size=16384, micro_batch_size=1)
    cfg.optimizer.update(lr=2e-4, min_lr=2e-5)
    cfg.scheduler.update(lr_warmup_iters=0, lr_warmup_tokens=500 * 16384 * 4096, lr_decay_style="WSD")
    cfg.scheduler.update(lr_wsd_decay_style="cosine", lr_decay_tokens="15.5T", lr_wsd_decay_tokens="5.5T")
    return cfg


def _without_groups(cfg: ConfigContainer, scaling: float) -> None:
    """Every expert may be chosen; one MTP layer with DeepSeek-V3's first loss factor."""
    cfg.model.update(moe_router_num_groups=None, moe_router_group_topk=None, moe_router_topk_scaling_factor=scaling)
    cfg.model.update(mtp_loss_scaling_factor=0.3)
