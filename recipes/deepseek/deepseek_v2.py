"""DeepSeek-V2-Lite, the smallest model with multi-latent attention, with an MTP layer added."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def deepseek_v2_lite_pretrain_config() -> ConfigContainer:
    """DeepSeek-V2-Lite (15.7B, 2.4B active) with one MTP layer at 4K: EP=8. Queries have no
    latent.

    YaRN came with the extension to 32K: model.rope_type=yarn model.mscale=0.707 model.mscale_all_dim=0.707.

    Sources: dimensions, deepseek-ai/DeepSeek-V3 inference/configs/config_16B.json and arXiv 2405.04434, appendix B,
    which also gives learning rate, tokens and batch; parallel sizes, Megatron-Bridge 067f987d recipes/deepseek/h100/
    deepseek_v2.py. The loss factor is DeepSeek-V3's first one.
    """
    cfg = pretrain_common()
    _set_architecture(cfg)
    model = cfg.model
    model.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.3, expert_model_parallel_size=8)
    model.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    cfg.train.update(train_iters=None, train_tokens="5.7T", global_batch_size=4608, micro_batch_size=1)
    cfg.optimizer.update(lr=4.2e-4, min_lr=4.2e-5)
    cfg.scheduler.lr_warmup_iters = 2000
    return cfg


def _set_architecture(cfg: ConfigContainer) -> None:
    model = cfg.model
    model.update(num_layers=27, hidden_size=2048, ffn_hidden_size=10944, num_attention_heads=16, layernorm_epsilon=1e-6)
    model.update(init_method_std=0.006, vocab_size=102400)

    model.update(multi_latent_attention=True, qk_layernorm=True, q_lora_rank=None, kv_lora_rank=512, qk_head_dim=128)
    model.update(qk_pos_emb_head_dim=64, v_head_dim=128)

    model.update(num_moe_experts=64, moe_layer_freq=[0] + [1] * 26, moe_ffn_hidden_size=1408)
    model.moe_shared_expert_intermediate_size = 2816  # two of the routed width
    model.moe_router_topk = 6
    model.moe_router_pre_softmax = True  # the chosen scores are not normalised
    model.update(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-3)
