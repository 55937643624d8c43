"""MiMo-7B, a dense model released with an MTP layer."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def mimo_7b_pretrain_config() -> ConfigContainer:
    """MiMo-7B with its MTP layer and loss factor at 8K: TP=4 with sequence parallelism.

    One schedule stands for the report's first two stages: constant to 10.3T, then a cosine to 3e-5 at 25T. Rotary
    positions have the base of the released weights; the report's stages at 8K have 10000.

    Sources: MiMo-7B's report, section 2 (dimensions, learning rate, batch, loss factor); THUDM/slime
    scripts/models/mimo-7b-rl.sh; XiaomiMiMo/vllm models/mimo.py (the hidden state that MTP reads); parallel sizes as
    Qwen3-8B's.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.update(num_layers=36, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=8)
    model.update(add_qkv_bias=True, rotary_base=640_000.0, layernorm_epsilon=1e-5, vocab_size=151680, seq_length=8192)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor="0.3@0,0.1@10.3T", mtp_hidden_source="pre_final_norm")

    model.update(tensor_model_parallel_size=4, sequence_parallel=True)
    cfg.train.update(train_iters=None, train_tokens="25T", global_batch_size=2560, micro_batch_size=1)
    cfg.optimizer.update(lr=1.07e-4, min_lr=3e-5)
    cfg.scheduler.update(lr_warmup_iters=0, lr_warmup_tokens=2000 * 2560 * 8192, lr_decay_style="WSD")
    cfg.scheduler.update(lr_wsd_decay_style="cosine", lr_decay_tokens="25T", lr_wsd_decay_tokens="14.7T")
    return cfg
