"""Wraps the model for data parallelism, builds the optimizer, and connects both to the pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.schedules import LearningRate, WeightDecay
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.mcore import optimizer as mcore_optimizer
from megatron_mtp.mcore.main_grad import add_in_place
from megatron_mtp.model.dtypes import TORCH_DTYPES
from megatron_mtp.training.guards.attribution import GradientWatch


def wrap_model(
    cfg: ConfigContainer, chunks: Sequence[nn.Module], groups: ProcessGroupCollection, device: torch.device
) -> list[DistributedDataParallel]:
    """Moves the chunks to `device`, casts them, and adds gradient buffers, which are averaged over dp x cp."""
    config: Any = chunks[0].config
    for chunk in chunks:
        chunk.to(device)
    if cfg.precision.dtype != "fp32":
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=cfg.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=cfg.ddp.overlap_grad_reduce,
        overlap_param_gather=cfg.ddp.overlap_param_gather and cfg.ddp.use_distributed_optimizer,
        use_distributed_optimizer=cfg.ddp.use_distributed_optimizer,
        bucket_size=cfg.ddp.bucket_size,
        check_for_nan_in_grad=cfg.ddp.check_for_nan_in_grad,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0, pg_collection=groups)
        for index, chunk in enumerate(chunks)
    ]
    add_in_place(wrapped)
    return wrapped


def build_optimizer(
    cfg: ConfigContainer, chunks: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> ChainedOptimizer:
    """The optimizer over the wrapped chunks.

    Raises:
        UnsupportedError: it needs a package that is not installed.
    """
    options, precision = cfg.optimizer, cfg.precision
    config = OptimizerConfig(
        optimizer=options.optimizer,
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        apply_wd_to_qk_layernorm=options.apply_wd_to_qk_layernorm,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        sgd_momentum=options.sgd_momentum,
        muon_momentum=options.muon_momentum,
        muon_num_ns_steps=options.muon_num_ns_steps,
        muon_scale_mode=options.muon_scale_mode,
        clip_grad=options.clip_grad,
        log_num_zeros_in_grad=options.log_num_zeros_in_grad,
        params_dtype=TORCH_DTYPES[precision.dtype],
        bf16=precision.dtype == "bf16",
        fp16=precision.dtype == "fp16",
        loss_scale=precision.loss_scale,
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.min_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
        use_distributed_optimizer=cfg.ddp.use_distributed_optimizer,
        overlap_param_gather=cfg.ddp.overlap_param_gather and cfg.ddp.use_distributed_optimizer,
    )
    try:
        return mcore_optimizer.build_optimizer(config, chunks, groups)
    except ImportError as error:
        raise UnsupportedError(
            f"optimizer.optimizer = {options.optimizer}: Megatron-Core needs a package for it that is not installed "
            f"({error}). Install it, or use adam."
        ) from error


def set_hooks(
    cfg: ConfigContainer,
    chunks: list[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    gradients: GradientWatch,
) -> None:
    """Sets the functions by which Megatron-Core's pipeline schedules scale the loss and reduce gradients.

    Args:
        gradients: looks at this rank's own gradients before they are reduced, and afterwards.
    """
    config = chunks[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = gradients.around(finalize_model_grads)
    is_interleaved = len(chunks) > 1
    if cfg.ddp.overlap_grad_reduce:
        no_syncs: list[Callable[..., Any]] = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_syncs if is_interleaved else no_syncs[0]
        if is_interleaved:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if cfg.ddp.overlap_param_gather and cfg.ddp.use_distributed_optimizer and is_interleaved:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]


def apply_schedules(
    optimizer: Any, learning_rate: LearningRate, weight_decay: WeightDecay, consumed_samples: float
) -> float:
    """Sets learning rate and weight decay of every parameter group for the step that starts after `consumed_samples`,
    as the clock of the schedules counts them.

    Megatron-Core's groups carry `max_lr`, `min_lr`, `start_wd`, `end_wd`, `lr_mult` and `wd_mult` where they differ.
    Groups without parameters are set too: a rank may hold none of the default group's.

    Returns:
        The learning rate of the default group, for the log.
    """
    for group in optimizer.param_groups:
        lr = learning_rate(consumed_samples, group.get("max_lr"), group.get("min_lr")) * group.get("lr_mult", 1.0)
        if hasattr(group.get("lr"), "fill_"):  # a tensor, under CUDA graphs
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        wd = weight_decay(consumed_samples, group.get("start_wd"), group.get("end_wd"))
        group["weight_decay"] = wd * group.get("wd_mult", 1.0)
    return learning_rate(consumed_samples)
