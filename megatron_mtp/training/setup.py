"""Builds everything a run needs, in order, and takes it down again."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.loader import DataModule, DataPlacement, build_data
from megatron_mtp.device.host_memory import return_freed_memory
from megatron_mtp.device.process_group import destroy_distributed, init_distributed
from megatron_mtp.device.select import Device
from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel, seed_dropout
from megatron_mtp.mcore.optimizer import single_optimizers
from megatron_mtp.model.build import build_model
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.objective.objective import Objective
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.resolve import ResolvedRun
from megatron_mtp.training.gpt_step import ForwardStep
from megatron_mtp.training.gpt_step import forward_step as default_forward_step
from megatron_mtp.training.guards.attribution import GradientWatch
from megatron_mtp.training.optimizer import build_optimizer, set_hooks, wrap_model
from megatron_mtp.training.step import Engine

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """One rank of a run, ready to train."""

    resolved: ResolvedRun
    device: Device
    groups: ProcessGroupCollection
    engine: Engine
    data: DataModule
    stop_reason: str | None = None
    """Why this rank asks to end the run; None: it does not ask."""

    def request_stop(self, reason: str) -> None:
        """Ends the run after the present step with a checkpoint and exit code 0. One rank that asks is enough."""
        self.stop_reason = reason

    @property
    def cfg(self) -> ConfigContainer:
        """The finalized config."""
        return self.resolved.cfg

    def close(self) -> None:
        """Ends threads and leaves the process groups. A failure on the way does not keep the rest from closing."""
        self.data.close()
        leave_groups()

    def release(self) -> None:
        """Ends threads and destroys the groups of this layout; the process stays in the job, for another run."""
        self.data.close()
        destroy_model_parallel()

    def drop(self) -> None:
        """Gives back the memory of model, gradients and optimizer, whoever still refers to them, for another run."""
        engine = self.engine
        models = [unwrap(chunk) for chunk in engine.chunks]
        parameters = [parameter for model in models for parameter in model.parameters()]
        tensors = [*parameters, *(buffer for model in models for buffer in model.buffers())]
        tensors += [parameter.main_grad for parameter in parameters if hasattr(parameter, "main_grad")]
        for single in single_optimizers(engine.optimizer):
            for state in single.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
            tensors += [parameter for group in single.optimizer.param_groups for parameter in group["params"]]
        for tensor in tensors:
            if (storage := tensor.untyped_storage()).resizable():
                storage.resize_(0)
        del self.engine, self.data
        return_freed_memory()


def join_groups(run: ResolvedRun) -> tuple[Device, ProcessGroupCollection]:
    """Joins the job, makes the process groups of the layout and seeds every random number generator."""
    device = init_distributed(run.cfg.dist)
    groups = make_groups(run)
    seed_generators(run.cfg, groups)
    return device, groups


def seed_generators(cfg: ConfigContainer, groups: ProcessGroupCollection) -> None:
    """Seeds every random number generator of this rank for its place in the layout."""
    seed = cfg.rng.seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    seed_dropout(seed, pp_rank=groups.pp.rank())
    if cfg.train.deterministic:
        torch.use_deterministic_algorithms(True)


def make_groups(run: ResolvedRun) -> ProcessGroupCollection:
    """Every process group of the layout, inside the job that this process has joined."""
    cfg, model = run.cfg, run.cfg.model
    assert run.world_size == dist.get_world_size(), "resolved for another number of processes"
    return init_model_parallel(
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        vp=run.layout.megatron_vp,
        cp=model.context_parallel_size,
        ep=model.expert_model_parallel_size,
        etp=run.grid.expert_tp,
        embedding_stages=embedding_stages(run.layout, model.share_embeddings_and_output_weights),
        pp_before_dp=cfg.dist.use_tp_pp_dp_mapping,
        timeout=timedelta(minutes=cfg.dist.distributed_timeout_minutes),
    )


def leave_groups() -> None:
    """Undoes `join_groups`."""
    destroy_model_parallel()
    destroy_distributed()


def embedding_stages(layout: PipelineLayout, is_tied: bool) -> list[int]:
    """Pipeline stages with a copy of the embedding: the first, the MTP stage, and the last if it is tied to the head.

    Megatron-Core's default, first and last, is wrong for a standalone MTP stage: the gradient of its copy would not be
    reduced, and an untied head's gradient would be added to the embedding's.
    """
    stages = {0}
    if layout.mtp_stage is not None:
        stages.add(layout.mtp_stage)
    if is_tied:
        stages.add(layout.pp - 1)
    return sorted(stages)


def setup(resolved: ResolvedRun, forward_step: ForwardStep = default_forward_step) -> Run:
    """Joins the job and builds model, optimizer and data of this rank.

    Args:
        resolved: the run, resolved for the number of processes of this job.
        forward_step: runs one micro-batch through one chunk.
    """
    return build(resolved, *join_groups(resolved), forward_step)


def build(resolved: ResolvedRun, device: Device, groups: ProcessGroupCollection, forward_step: ForwardStep) -> Run:
    """Builds model, optimizer and data of this rank, which has joined the job."""
    cfg, num_depths = resolved.cfg, resolved.depths.count
    place = DataPlacement(groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size())
    data = build_data(cfg, place, num_depths, pin_memory=device.is_cuda)
    chunks = wrap_model(cfg, build_model(resolved, groups, device.torch_device), groups, device.torch_device)
    optimizer = build_optimizer(cfg, chunks, groups)
    gradients = GradientWatch(chunks, cfg.ddp.overlap_grad_reduce)
    set_hooks(cfg, chunks, optimizer, gradients)
    if num_depths and not any(unwrap(chunk).mtp_process for chunk in chunks):
        logger.debug("this rank holds no MTP layer", extra={"all_ranks": True})
    objective = Objective.of(resolved, groups, device.torch_device)
    engine = Engine(chunks, optimizer, groups, objective, forward_step, gradients)
    return Run(resolved, device, groups, engine, data)
