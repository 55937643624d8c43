"""Mixtral, a mixture of eight large experts, with an MTP layer added."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def mixtral_8x7b_pretrain_config() -> ConfigContainer:
    """Mixtral-8x7B with one MTP layer at 4K: PP=2, EP=8, layers recomputed.

    Mistral published no training settings: learning rate and batch are pretrain_common's with a larger batch, the
    coefficient of the balancing loss is transformers', the loss factor Megatron-Core's default, the parallel sizes this
    project's.

    Source: dimensions, transformers 5.23.0 models/mixtral; arXiv 2401.04088.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.update(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8)
    model.update(rotary_base=1_000_000.0, layernorm_epsilon=1e-5, vocab_size=32000)

    model.update(num_moe_experts=8, moe_router_topk=2, moe_router_load_balancing_type="aux_loss")
    model.update(moe_aux_loss_coeff=1e-3)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)

    model.update(pipeline_model_parallel_size=2, expert_model_parallel_size=8, recompute_granularity="full")
    model.update(recompute_method="uniform", recompute_num_layers=1)
    cfg.train.update(global_batch_size=256, micro_batch_size=1)
    return cfg
