"""Llama 3 dense models with an MTP layer added. Llama 3 was released without any."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def llama3_8b_pretrain_config() -> ConfigContainer:
    """Llama 3 8B with one MTP layer at 8K: CP=4.

    Llama 3.1's positions come with its extension to 128K: model.rope_scaling=true.

    Sources: dimensions, THUDM/slime 624b824a scripts/models/llama3.1-8B-Instruct.sh; learning rate, arXiv 2407.21783,
    table 3; batch, Megatron-Bridge 067f987d recipes/llama/h100/llama3.py, whose CP=2 does not fit with an MTP layer.
    The loss factor is Megatron-Core's default.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.update(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8)
    model.update(rotary_base=500_000.0, layernorm_epsilon=1e-5, vocab_size=128256, seq_length=8192)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)

    model.context_parallel_size = 4
    cfg.train.update(global_batch_size=512, micro_batch_size=1)
    cfg.optimizer.update(lr=3e-4, min_lr=3e-6)
    cfg.scheduler.lr_warmup_iters = 2000
    return cfg


def llama3_70b_pretrain_config() -> ConfigContainer:
    """Llama 3 70B with one MTP layer at 8K: TP=4 with sequence parallelism, PP=4, CP=2.

    Sources: as `llama3_8b_pretrain_config`; dimensions, arXiv 2407.21783, table 3. Megatron-Bridge's 5 chunks of each
    stage do not fit with an MTP layer.
    """
    cfg = llama3_8b_pretrain_config()
    model = cfg.model
    model.update(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)
    model.update(tensor_model_parallel_size=4, sequence_parallel=True, pipeline_model_parallel_size=4)
    model.context_parallel_size = 2
    cfg.optimizer.update(lr=1.5e-4, min_lr=1.5e-6)
    return cfg
