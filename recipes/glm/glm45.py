"""GLM-4.5, mixture-of-experts models released with an MTP layer."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def glm45_pretrain_config() -> ConfigContainer:
    """GLM-4.5 (355B, 32B active) with its MTP layer and loss factor, on 128 GPUs of 80 GB: TP=2 with sequence
    parallelism, PP=8, EP=16.

    The report trains with Muon, whose updates have the size of AdamW's; its learning rate is used with AdamW here, as a
    cosine over all 22T tokens. Rotary positions have the base of the released weights; the report's 4K phase has 10000.

    Sources: GLM-4.5's report, table 1 and section 2.4 (dimensions, batch, learning rate, loss factor, balancing);
    transformers 5.23.0 models/glm4_moe; parallel sizes, Megatron-Bridge 067f987d recipes/glm/h100/glm45.py.
    """
    cfg = pretrain_common()
    _set_architecture(cfg)
    _set_training(cfg)
    model = cfg.model
    model.tensor_model_parallel_size = 2
    model.sequence_parallel = True
    model.pipeline_model_parallel_size = 8
    model.expert_model_parallel_size = 16
    model.expert_tensor_parallel_size = 1
    model.recompute_granularity = "selective"
    return cfg


def glm45_air_pretrain_config() -> ConfigContainer:
    """GLM-4.5-Air (106B, 12B active) with its MTP layer, on 32 GPUs of 80 GB: PP=4, EP=8. No norm of queries and keys.

    The scaling of routed experts is 1.0 as in transformers and slime; a test of Megatron-Bridge has 2.5.

    Sources: as `glm45_pretrain_config`.
    """
    cfg = glm45_pretrain_config()
    model = cfg.model
    model.num_layers = 46
    model.hidden_size = 4096
    model.ffn_hidden_size = 10944
    model.qk_layernorm = False
    model.num_moe_experts = 128
    model.moe_layer_freq = [0] + [1] * 45
    model.moe_ffn_hidden_size = 1408
    model.moe_shared_expert_intermediate_size = 1408
    model.moe_router_topk_scaling_factor = None
    model.tensor_model_parallel_size = 1
    model.pipeline_model_parallel_size = 4
    model.expert_model_parallel_size = 8
    return cfg


def _set_architecture(cfg: ConfigContainer) -> None:
    model = cfg.model
    model.num_layers = 92
    model.hidden_size = 5120
    model.ffn_hidden_size = 12288
    model.num_attention_heads = 96
    model.num_query_groups = 8
    model.kv_channels = 128
    model.qk_layernorm = True
    model.add_qkv_bias = True
    model.rotary_base = 1_000_000.0
    model.rotary_percent = 0.5
    model.layernorm_epsilon = 1e-5
    model.vocab_size = 151552

    model.num_moe_experts = 160
    model.moe_layer_freq = [0] * 3 + [1] * 89
    model.moe_ffn_hidden_size = 1536
    model.moe_shared_expert_intermediate_size = 1536
    model.moe_router_topk = 8
    model.moe_router_topk_scaling_factor = 2.5
    model.moe_router_score_function = "sigmoid"
    model.moe_router_enable_expert_bias = True
    model.moe_router_bias_update_rate = 1e-3
    model.moe_router_load_balancing_type = "seq_aux_loss"
    model.moe_aux_loss_coeff = 1e-4

    model.mtp_num_layers = 1
    model.mtp_loss_scaling_factor = "0.3@0,0.1@15T"


def _set_training(cfg: ConfigContainer) -> None:
    cfg.train.train_iters = None
    cfg.train.train_tokens = "22T"
    cfg.train.micro_batch_size = 1
    # 16M to 64M tokens over the first 500B
    cfg.train.global_batch_size = 16384
    cfg.train.rampup_batch_size = [4096, 4096, round(500e9 / cfg.model.seq_length)]
    cfg.optimizer.lr = 2.5e-4
    cfg.optimizer.min_lr = 2.5e-5
    cfg.scheduler.lr_warmup_iters = 2000
    cfg.validation.eval_interval = 2000
    cfg.checkpoint.save_interval = 2000
