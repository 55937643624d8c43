"""DeepSeek-V3, the model whose report introduced sequential MTP."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def deepseek_v3_pretrain_config() -> ConfigContainer:
    """DeepSeek-V3 (671B, 37B active) with its MTP layer, its data schedule and loss factor:
    TP=2 with sequence parallelism, PP=16, EP=64.

    The last 167B tokens of the report, at a constant 7.3e-6, are not part of the schedule: they run at 2.2e-5.
    `deepseek_v3_whole` has them, and the extension to long context.

    Sources: arXiv 2412.19437, section 4.2 (dimensions, learning rate, batch sizes, loss factor, balancing) and 2.2
    (MTP); parallel sizes, Megatron-Bridge 067f987d recipes/deepseek/h100/deepseek_v3.py.
    """
    cfg = deepseek_v3_architecture()
    _set_training(cfg)
    model = cfg.model
    model.update(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=16)
    model.update(expert_model_parallel_size=64, expert_tensor_parallel_size=1)
    return cfg


def deepseek_v3_architecture() -> ConfigContainer:
    """The model with its MTP layer, on one rank, with the common training settings; other families change fields of
    it.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.update(num_layers=61, hidden_size=7168, ffn_hidden_size=18432, num_attention_heads=128)
    model.update(layernorm_epsilon=1e-6, init_method_std=0.006, vocab_size=129280)

    model.update(multi_latent_attention=True, qk_layernorm=True, q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128)
    model.update(qk_pos_emb_head_dim=64, v_head_dim=128)
    model.rope_type = "rope"  # YaRN comes with the extension to long context, after pretraining at 4K

    model.update(num_moe_experts=256, moe_layer_freq=[0] * 3 + [1] * 58, moe_ffn_hidden_size=2048)
    model.update(moe_shared_expert_intermediate_size=2048, moe_router_topk=8, moe_router_num_groups=8)
    model.update(moe_router_group_topk=4, moe_router_topk_scaling_factor=2.5, moe_router_score_function="sigmoid")
    model.update(moe_router_enable_expert_bias=True, moe_router_bias_update_rate=1e-3)
    model.update(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-4)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor="0.3@0,0.1@10T")
    return cfg


def _set_training(cfg: ConfigContainer) -> None:
    samples_per_token = 1 / cfg.model.seq_length
    cfg.train.update(train_iters=None, train_tokens="14.8T", micro_batch_size=1, global_batch_size=15360)
    cfg.train.update(rampup_batch_size=[3072, 3072, round(469e9 * samples_per_token)])
    cfg.optimizer.update(lr=2.2e-4, min_lr=2.2e-5)
    # 2000 steps of the first batch size, constant to 10T, then a cosine over 4.3T.
    cfg.scheduler.update(lr_warmup_iters=0, lr_warmup_tokens=2000 * 3072 * cfg.model.seq_length, lr_decay_style="WSD")
    cfg.scheduler.update(lr_decay_tokens="14.3T", lr_wsd_decay_style="cosine", lr_wsd_decay_tokens="4.3T")
    cfg.validation.eval_interval = 2000
    cfg.checkpoint.save_interval = 2000


def deepseek_v3_whole_pretrain_config() -> ConfigContainer:
    """The whole published pretraining of DeepSeek-V3 in phases: `deepseek_v3` at 4K, the end of its schedule, then 1000
    steps at 32K and 1000 at 128K with YaRN.

    14.3T tokens: the balancing bias is no longer updated. 14.633T: a constant 7.3e-6, which stays. 14.8T: 32K context,
    batch 1920. 14.863T: 128K, batch 480. Both long phases recompute all layers and shard the sequence.

    Sources: arXiv 2412.19437, sections 4.2 and 4.3; YaRN's mscale, config.json of the released weights. The parallel
    sizes of the long phases are not published; those here fit the devices of the first phase.
    """
    cfg = deepseek_v3_pretrain_config()
    extension = 1000 * 1920 * 32768  # tokens of each long phase: 480 * 131072 is as much
    cfg.train.train_tokens = 14_800_000_000_000 + 2 * extension
    constant = {"lr_decay_style": "constant", "lr_decay_tokens": None, "lr_wsd_decay_tokens": None}
    yarn = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 4096}
    yarn |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    cfg.phases = {
        "balanced": {"start_tokens": "14.3T", "model": {"moe_router_bias_update_rate": 0.0}},
        "last": {
            "start_tokens": "14.633T",
            "optimizer": {"lr": 7.3e-6, "min_lr": 7.3e-6},
            "scheduler": {**constant, "lr_warmup_tokens": 0},
        },
        "context_32k": {
            "start_tokens": "14.8T",
            "model": {"seq_length": 32768, "context_parallel_size": 4, **yarn, **full},
            "train": {"global_batch_size": 1920, "rampup_batch_size": None},
        },
        "context_128k": {
            "start_tokens": 14_800_000_000_000 + extension,
            "model": {"seq_length": 131072, "context_parallel_size": 16},
            "train": {"global_batch_size": 480},
        },
    }
    return cfg
