"""What recipes share: defaults of a pretraining run, and of a run small enough for a laptop."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer


def pretrain_common() -> ConfigContainer:
    """Defaults of a pretraining run on GPUs: bf16, AdamW with a cosine from 3e-4 to 3e-5, sharded optimizer, mock data.

    The caller sets the model. No folder is set: nothing is saved, and no older run is resumed by accident.

    Source: Megatron-Bridge 067f987d, recipes/common.py `_pretrain_common`, without its shared default output folder.
    """
    cfg = ConfigContainer()
    cfg.train.update(train_iters=300_000, global_batch_size=32, micro_batch_size=2)
    cfg.validation.update(eval_interval=500, eval_iters=32)
    cfg.optimizer.update(lr=3e-4, min_lr=3e-5)
    cfg.scheduler.update(lr_decay_style="cosine", lr_warmup_iters=500)
    cfg.ddp.update(overlap_grad_reduce=True, overlap_param_gather=True)
    cfg.checkpoint.save_interval = 500
    cfg.model.seq_length = 4096
    return cfg


def small_common() -> ConfigContainer:
    """Defaults of a run that takes seconds on a CPU: fp32, short warmup, short evaluation, no overlap."""
    cfg = pretrain_common()
    cfg.precision.dtype = "fp32"
    cfg.train.update(train_iters=50, global_batch_size=8, micro_batch_size=2)
    cfg.validation.update(eval_interval=None, eval_iters=4)
    cfg.optimizer.update(lr=3e-3, min_lr=3e-4)
    cfg.scheduler.lr_warmup_iters = 10
    cfg.ddp.update(overlap_grad_reduce=False, overlap_param_gather=False)
    cfg.checkpoint.save_interval = None
    cfg.logger.log_interval = 1
    return cfg
