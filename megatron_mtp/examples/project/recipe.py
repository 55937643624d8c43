"""The recipe of my_project: a function that returns a config. `megatron-mtp show recipe.py:my_project` prints it."""

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes import get_recipe


def my_project() -> ConfigContainer:
    """A tiny model on mock data, to be replaced: `megatron-mtp recipes` lists where to start from."""
    cfg = get_recipe("tiny_dense")
    cfg.model.mtp_num_layers = 1
    cfg.train.update(train_iters=60, global_batch_size=8, micro_batch_size=4)
    cfg.optimizer.update(lr=3e-3, min_lr=3e-4)
    cfg.scheduler.lr_warmup_iters = 10
    cfg.validation.update(eval_interval=20, eval_iters=4)
    cfg.checkpoint.update(save="runs/my_project", load="runs/my_project", save_interval=20, keep_best=1)
    return cfg
