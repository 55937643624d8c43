"""One optimizer step, and one evaluation pass over a global batch: forward, backward, update, metrics."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.profiler import record_function

from megatron_mtp.config.sections import TrainConfig
from megatron_mtp.data.batch import GlobalBatch
from megatron_mtp.mcore.optimizer import guarded_step
from megatron_mtp.mcore.router import router_losses
from megatron_mtp.objective.metrics import BatchMetrics
from megatron_mtp.objective.objective import Objective
from megatron_mtp.training.gpt_step import ForwardStep
from megatron_mtp.training.guards.attribution import GradientWatch
from megatron_mtp.training.guards.faults import Fault, FaultWatch
from megatron_mtp.training.state import TrainState


@dataclass(frozen=True, slots=True)
class StepResult(BatchMetrics):
    """Metrics of one step, and what became of its update.

    Attributes:
        updated: the update was applied.
        grad_norm: norm of the gradient before clipping; None where it was not computed.
        num_zeros: zeros in the gradient, if they are counted.
        fault: what is wrong with the step.
        update_s: seconds that this rank took for the norm of the gradient and the update; None: there was none.
    """

    updated: bool = False
    grad_norm: float | None = None
    num_zeros: int | None = None
    fault: Fault | None = None
    update_s: float | None = None

    @property
    def has_nan(self) -> bool:
        """Whether the gradient, or the loss of a depth with valid targets, is not finite."""
        is_bad = self.fault is not None and self.fault.kind == "nan"
        return is_bad or not all(map(math.isfinite, self.valid_losses().values()))


@dataclass(frozen=True, slots=True)
class Engine:
    """One rank's model, and everything that its steps have in common.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        optimizer: over their parameters.
        groups: process groups of the layout.
        objective: of the run.
        forward_step: runs one micro-batch through one model chunk.
        gradients: notes which of this rank's gradients are not finite.
    """

    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    groups: ProcessGroupCollection
    objective: Objective
    forward_step: ForwardStep
    gradients: GradientWatch

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.objective.device

    def train(self, batch: GlobalBatch, loss_factor: float, watch: FaultWatch | None = None) -> StepResult:
        """Forward and backward over all micro-batches, then the update, unless losses or gradient forbid it.

        Args:
            batch: this rank's part of the global batch.
            loss_factor: lambda at this step.
            watch: judges the step; None: a step that is not finite is not applied, and nothing is a spike.
        """
        with record_function("forward and backward"):
            metrics = self.forward_backward(batch, loss_factor)
        found = {field.name: getattr(metrics, field.name) for field in fields(metrics)}
        watch = watch or FaultWatch(TrainConfig(), TrainState())
        losses = metrics.valid_losses()
        fault = watch.of_losses(losses)
        if not watch.lets_pass(fault):
            return StepResult(**found, fault=fault)

        def permits(norm: float | None) -> bool:
            nonlocal fault
            fault = watch.of_gradient(norm) or fault
            return watch.lets_pass(fault)

        began = time.perf_counter()
        with record_function("update"):
            updated, norm, num_zeros = guarded_step(self.optimizer, permits)
        update_s = time.perf_counter() - began
        if updated and fault is None:
            watch.remember(losses, norm)
        return StepResult(**found, updated=updated, grad_norm=norm, num_zeros=num_zeros, fault=fault, update_s=update_s)

    def forward_backward(self, batch: GlobalBatch, loss_factor: float) -> BatchMetrics:
        """Leaves the gradients of the total, reduced over all ranks, in the gradient buffers."""
        self.gradients.begin()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batch, loss_factor, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batch: GlobalBatch, loss_factor: float) -> BatchMetrics:
        """Forward only; dropout off."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            return self._run(batch, loss_factor, forward_only=True)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def _run(self, batch: GlobalBatch, loss_factor: float, *, forward_only: bool) -> BatchMetrics:
        num_microbatches = len(batch.micro_batches)
        objective = self.objective.begin(
            batch.num_targets, loss_factor, num_microbatches, self.optimizer.get_loss_scale()
        )
        micro_batch_size, local_length = batch.micro_batches[0].tokens.shape  # [b, s/cp]
        iterators = [iter(batch.micro_batches) for _ in self.chunks]
        is_interleaved = len(self.chunks) > 1
        run = get_forward_backward_func(self.groups.pp.size(), len(self.chunks) if is_interleaved else None)
        outputs = run(
            forward_step_func=partial(self.forward_step, objective),
            data_iterator=iterators if is_interleaved else iterators[0],
            model=self.chunks if is_interleaved else self.chunks[0],
            num_microbatches=num_microbatches,
            seq_length=local_length * self.groups.cp.size(),
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(self.groups.pp, self.chunks[0].config),
            pg_collection=self.groups,
        )
        return objective.metrics(outputs, None if forward_only else router_losses())
