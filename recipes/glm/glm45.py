"""GLM-4.5, mixture-of-experts models released with an MTP layer."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def glm45_pretrain_config() -> ConfigContainer:
    """GLM-4.5 (355B, 32B active) with its MTP layer and loss factor: TP=2 with sequence parallelism, PP=16,
    EP=8, feed-forward layers recomputed.

    The report trains with Muon, whose updates have the size of AdamW's; its learning rate is used with AdamW here, as a
    cosine over all 22T tokens. Rotary positions have the base of the released weights; the report's 4K phase has 10000.

    Sources: GLM-4.5's report, table 1 and section 2.4 (dimensions, batch, learning rate, loss factor, balancing);
    transformers 5.23.0 models/glm4_moe. The parallel sizes are the planner's, as Megatron-Bridge's (067f987d
    recipes/glm/h100/glm45.py: PP=8, EP=16) do not fit the memory that it estimates.
    """
    cfg = pretrain_common()
    _set_architecture(cfg)
    _set_training(cfg)
    model = cfg.model
    model.update(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=16)
    model.update(expert_model_parallel_size=8, expert_tensor_parallel_size=1)
    model.update(recompute_granularity="selective", recompute_modules=["mlp", "moe"])
    return cfg


def glm45_air_pretrain_config() -> ConfigContainer:
    """GLM-4.5-Air (106B, 12B active) with its MTP layer: TP=4 with sequence parallelism, PP=4, EP=8. No norm of
    queries and keys.

    The scaling of routed experts is 1.0 as in transformers and slime; a test of Megatron-Bridge has 2.5.

    Sources: as `glm45_pretrain_config`.
    """
    cfg = glm45_pretrain_config()
    model = cfg.model
    model.update(num_layers=46, hidden_size=4096, ffn_hidden_size=10944, qk_layernorm=False, num_moe_experts=128)
    model.update(moe_layer_freq=[0] + [1] * 45, moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=1408)
    model.update(moe_router_topk_scaling_factor=None, tensor_model_parallel_size=4, pipeline_model_parallel_size=4)
    model.update(recompute_granularity=None, recompute_modules=None)
    return cfg


def _set_architecture(cfg: ConfigContainer) -> None:
    model = cfg.model
    model.update(num_layers=92, hidden_size=5120, ffn_hidden_size=12288, num_attention_heads=96, num_query_groups=8)
    model.update(kv_channels=128, qk_layernorm=True, add_qkv_bias=True, rotary_base=1_000_000.0, rotary_percent=0.5)
    model.update(layernorm_epsilon=1e-5, vocab_size=151552)

    model.update(num_moe_experts=160, moe_layer_freq=[0] * 3 + [1] * 89, moe_ffn_hidden_size=1536)
    model.update(moe_shared_expert_intermediate_size=1536, moe_router_topk=8, moe_router_topk_scaling_factor=2.5)
    model.update(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    model.update(moe_router_bias_update_rate=1e-3, moe_router_load_balancing_type="seq_aux_loss")
    model.update(moe_aux_loss_coeff=1e-4)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor="0.3@0,0.1@15T")


def _set_training(cfg: ConfigContainer) -> None:
    cfg.train.update(train_iters=None, train_tokens="22T", micro_batch_size=1)
    # 16M to 64M tokens over the first 500B
    cfg.train.update(global_batch_size=16384, rampup_batch_size=[4096, 4096, round(500e9 / cfg.model.seq_length)])
    cfg.optimizer.update(lr=2.5e-4, min_lr=2.5e-5)
    cfg.scheduler.lr_warmup_iters = 2000
    cfg.validation.eval_interval = 2000
    cfg.checkpoint.save_interval = 2000
