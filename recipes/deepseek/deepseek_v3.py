"""DeepSeek-V3, the model whose report introduced sequential MTP."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def deepseek_v3_pretrain_config() -> ConfigContainer:
    """DeepSeek-V3 (671B, 37B active) with its MTP layer, its data schedule and loss factor, on 1024 GPUs of 80 GB:
    TP=2 with sequence parallelism, PP=16, EP=64.

    The last 167B tokens of the report, at a constant 7.3e-6, are not part of the schedule: they run at 2.2e-5.

    Sources: arXiv 2412.19437, section 4.2 (dimensions, learning rate, batch sizes, loss factor, balancing) and 2.2
    (MTP); parallel sizes, Megatron-Bridge 067f987d recipes/deepseek/h100/deepseek_v3.py.
    """
    cfg = deepseek_v3_architecture()
    _set_training(cfg)
    model = cfg.model
    model.tensor_model_parallel_size = 2
    model.sequence_parallel = True
    model.pipeline_model_parallel_size = 16
    model.expert_model_parallel_size = 64
    model.expert_tensor_parallel_size = 1
    return cfg


def deepseek_v3_architecture() -> ConfigContainer:
    """The model with its MTP layer, on one rank, with the common training settings; other families change fields of
    it.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.num_layers = 61
    model.hidden_size = 7168
    model.ffn_hidden_size = 18432
    model.num_attention_heads = 128
    model.layernorm_epsilon = 1e-6
    model.init_method_std = 0.006
    model.vocab_size = 129280

    model.multi_latent_attention = True
    model.qk_layernorm = True
    model.q_lora_rank = 1536
    model.kv_lora_rank = 512
    model.qk_head_dim = 128
    model.qk_pos_emb_head_dim = 64
    model.v_head_dim = 128
    model.rope_type = "rope"  # YaRN comes with the extension to long context, after pretraining at 4K

    model.num_moe_experts = 256
    model.moe_layer_freq = [0] * 3 + [1] * 58
    model.moe_ffn_hidden_size = 2048
    model.moe_shared_expert_intermediate_size = 2048
    model.moe_router_topk = 8
    model.moe_router_num_groups = 8
    model.moe_router_group_topk = 4
    model.moe_router_topk_scaling_factor = 2.5
    model.moe_router_score_function = "sigmoid"
    model.moe_router_enable_expert_bias = True
    model.moe_router_bias_update_rate = 1e-3
    model.moe_router_load_balancing_type = "seq_aux_loss"
    model.moe_aux_loss_coeff = 1e-4

    model.mtp_num_layers = 1
    model.mtp_loss_scaling_factor = "0.3@0,0.1@10T"
    return cfg


def _set_training(cfg: ConfigContainer) -> None:
    samples_per_token = 1 / cfg.model.seq_length
    cfg.train.train_iters = None
    cfg.train.train_tokens = "14.8T"
    cfg.train.micro_batch_size = 1
    cfg.train.global_batch_size = 15360
    cfg.train.rampup_batch_size = [3072, 3072, round(469e9 * samples_per_token)]
    cfg.optimizer.lr = 2.2e-4
    cfg.optimizer.min_lr = 2.2e-5
    # 2000 steps of the first batch size, constant to 10T, then a cosine over 4.3T.
    cfg.scheduler.lr_warmup_iters = 0
    cfg.scheduler.lr_warmup_tokens = 2000 * 3072 * cfg.model.seq_length
    cfg.scheduler.lr_decay_style = "WSD"
    cfg.scheduler.lr_decay_tokens = "14.3T"
    cfg.scheduler.lr_wsd_decay_style = "cosine"
    cfg.scheduler.lr_wsd_decay_tokens = "4.3T"
    cfg.validation.eval_interval = 2000
    cfg.checkpoint.save_interval = 2000
