"""Training a drafter after pretraining, as FastMTP does, for any model."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.demo import demo_pretrain_config

NUM_STEPS = 3
DECAY = 0.6


def mtp_finetune_config() -> ConfigContainer:
    """The demo's model as a drafter of three steps: `finetune_drafter` on the demo.

    Give it weights with checkpoint.pretrained_checkpoint, and data that the model wrote (drafting/continuations.py).
    """
    cfg = finetune_drafter(demo_pretrain_config())
    cfg.model.update(pipeline_model_parallel_size=1, pipeline_model_parallel_layout="auto")
    cfg.train.train_iters = 150
    cfg.optimizer.update(lr=1e-3, min_lr=1e-4)
    cfg.scheduler.lr_warmup_iters = 8
    return cfg


def finetune_drafter(cfg: ConfigContainer, num_steps: int = NUM_STEPS, decay: float = DECAY) -> ConfigContainer:
    """Turns a pretraining run into one that trains only the drafter.

    Trunk, embedding and head are frozen. One MTP layer is applied `num_steps` times in a row, as in drafting that many
    tokens. Step k has the weight decay^(k-1), because a draft counts only if those before it were accepted. A layer
    trained for one step and applied three times is accepted 70, 11 and 2 %; trained unrolled, 81, 56 and 36 %.
    Source: FastMTP, arXiv 2509.18362, sections 3 and 4.

    Args:
        cfg: unfinalized config of the model to draft for.
        num_steps: tokens to draft.
        decay: 0.6 in the paper: weights 0.51, 0.31 and 0.18.
    """
    model = cfg.model
    model.update(mtp_freeze_trunk=True, mtp_use_repeated_layer=True, mtp_num_layers=num_steps)
    # Apart from the learning rate only proportions matter: lambda / D * w_k sums to 1.
    weights = [decay**k for k in range(num_steps)]
    model.update(mtp_depth_weights=[num_steps * weight / sum(weights) for weight in weights])
    model.update(mtp_loss_scaling_factor=1.0)
    cfg.optimizer.update(lr=5e-5, min_lr=0.0)
    return cfg
