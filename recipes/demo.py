"""The run of `make demo`: a small dense model with two prediction depths on two pipeline stages."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import small_common


def demo_pretrain_config() -> ConfigContainer:
    """A Qwen3-like dense model for two CPU ranks: PP=2, D=2, the MTP layers with the loss on the last stage.

    It runs on mock data as it is; `make demo` points dataset and tokenizer at real text.
    """
    cfg = small_common()
    cfg.model.update(num_layers=10, hidden_size=96, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2)
    cfg.model.update(qk_layernorm=True, rotary_base=10000.0, layernorm_epsilon=1e-6, seq_length=256, vocab_size=1024)
    cfg.model.update(mtp_num_layers=2, mtp_loss_scaling_factor=0.1)
    # With equal weights depth 2, which reads depth 1's output, ended below depth 1: depth 1 served it, not itself.
    cfg.model.update(mtp_depth_weights=[1.0, 0.1], pipeline_model_parallel_size=2)
    # Two MTP layers and three heads weigh about as much as four decoder layers.
    cfg.model.pipeline_model_parallel_layout = [7, 3]
    cfg.train.update(train_iters=500, global_batch_size=8, micro_batch_size=2)
    # At 4e-3 after 30 steps a jump of the gradient turned rounding into 0.06 nats between two micro-batch sizes.
    cfg.optimizer.update(lr=2e-3, min_lr=2e-4)
    cfg.scheduler.lr_warmup_iters = 100
    cfg.validation.update(eval_interval=250, eval_iters=70)
    cfg.logger.log_interval = 10
    return cfg
