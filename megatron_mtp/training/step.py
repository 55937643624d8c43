"""One optimizer step, and one evaluation pass over a global batch: read as forward, backward, update, figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_mtp.config.sections import TrainConfig
from megatron_mtp.data.batch import GlobalBatch
from megatron_mtp.mcore.optimizer import guarded_step
from megatron_mtp.mcore.router import router_losses
from megatron_mtp.objective.acceptance import ROWS
from megatron_mtp.objective.heads import DepthHeads
from megatron_mtp.objective.total import StepObjective, coefficients, depth_losses, global_counts
from megatron_mtp.training.figures import loss_names
from megatron_mtp.training.gpt_step import StepContext
from megatron_mtp.training.guards.attribution import GradientWatch
from megatron_mtp.training.guards.faults import Fault, FaultWatch
from megatron_mtp.training.state import TrainState

ForwardStep = Callable[[StepContext, Any, nn.Module], tuple[Tensor, Callable]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one step, the same on every rank but for local_sums.

    depth_sums [1+D] fp64 [nats], depth_counts [1+D] int64 and losses [1+D] fp64 [nats per token] are what the
    gradient was made of. router is name -> mean over layers and micro-batches. grad_norm is None in evaluation.
    local_sums [1+D] fp64 are this rank's own part of depth_sums; zeros before the last stage. fault is what is wrong with the step.
    """

    depth_sums: Tensor
    depth_counts: Tensor
    losses: list[float]
    acceptance: Tensor  # [rows of objective.acceptance.ROWS, 1+D] int64, over the global batch
    router: dict[str, float]
    local_sums: Tensor
    updated: bool = False
    grad_norm: float | None = None
    num_zeros: int | None = None
    fault: Fault | None = None

    @property
    def has_nan(self) -> bool:
        """A depth with valid targets has a loss that is not finite, or the gradient is not."""
        is_bad = self.fault is not None and self.fault.kind == "nan"
        return is_bad or not all(map(math.isfinite, self.valid_losses().values()))

    def valid_losses(self) -> dict[str, float]:
        """Losses by name of the depths that have valid targets: the others are NaN by definition."""
        names = loss_names(len(self.losses) - 1)
        triples = zip(names, self.losses, self.depth_counts.tolist(), strict=True)
        return {name: loss for name, loss, count in triples if count}


@dataclass(frozen=True, slots=True)
class Engine:
    """The model on this rank and everything a step needs that does not change from step to step."""

    chunks: list[nn.Module]
    optimizer: Any
    groups: ProcessGroupCollection
    heads: DepthHeads
    device: torch.device
    forward_step: ForwardStep
    seq_length: int
    num_depths: int
    num_layers: int
    num_moe_layers: int  # of the whole model, MTP layers included; a repeated MTP layer counts once
    router_loss_names: tuple[str, ...]
    depth_weights: list[float] | None
    z_loss_coeff: float
    gradients: GradientWatch | None = None

    def train(self, batch: GlobalBatch, loss_factor: float, watch: FaultWatch | None = None) -> StepResult:
        """Forward and backward over all micro-batches, then the update, unless losses or gradient forbid it.

        Args:
            batch: this rank's part of the global batch.
            loss_factor: lambda at this step.
            watch: judges the step; None: what is not finite is not applied, and nothing is a spike.
        """
        figures = self.forward_backward(batch, loss_factor)
        watch = watch or FaultWatch(TrainConfig(), TrainState())
        losses = figures.valid_losses()
        fault = watch.of_losses(losses)
        if not watch.lets_pass(fault):
            return replace(figures, fault=fault)

        def permits(norm: float | None) -> bool:
            nonlocal fault
            fault = watch.of_gradient(norm) or fault
            return watch.lets_pass(fault)

        updated, norm, num_zeros = guarded_step(self.optimizer, permits)
        if updated and fault is None:
            watch.remember(losses, norm)
        return replace(figures, updated=updated, grad_norm=norm, num_zeros=num_zeros, fault=fault)

    def forward_backward(self, batch: GlobalBatch, loss_factor: float) -> StepResult:
        """Leaves the gradients of the total, reduced over all ranks, in the gradient buffers."""
        if self.gradients is not None:
            self.gradients.begin()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batch, loss_factor, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batch: GlobalBatch, loss_factor: float) -> StepResult:
        """Forward only; dropout off."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            return self._run(batch, loss_factor, forward_only=True)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def _run(self, batch: GlobalBatch, loss_factor: float, *, forward_only: bool) -> StepResult:
        counts = global_counts(batch.num_targets.to(self.device), self.groups.dp_cp)
        num_micro_batches = len(batch.micro_batches)
        objective = StepObjective(
            coefficients=coefficients(counts, loss_factor, self.depth_weights),
            counts=counts,
            num_micro_batches=num_micro_batches,
            dp_cp_size=self.groups.dp_cp.size(),
            z_loss_coeff=self.z_loss_coeff,
        )
        context = StepContext(self.heads, objective, self.device, self.groups.cp)
        iterators = [iter(batch.micro_batches) for _ in self.chunks]
        run = get_forward_backward_func(self.groups.pp.size(), len(self.chunks) if len(self.chunks) > 1 else None)
        outputs = run(
            forward_step_func=partial(self.forward_step, context),
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=num_micro_batches,
            seq_length=self.seq_length,
            micro_batch_size=batch.micro_batches[0].tokens.shape[0],
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(self.groups.pp, self.chunks[0].config),
            pg_collection=self.groups,
        )
        return self._figures(outputs, context, counts, num_micro_batches)

    def _figures(
        self, outputs: list[dict[str, Tensor]], context: StepContext, counts: Tensor, num_micro_batches: int
    ) -> StepResult:
        """Sums over micro-batches and ranks, and the last stage's figures sent to all stages."""
        num_states = 1 + self.num_depths
        sums = torch.zeros(2, num_states, dtype=torch.float64, device=self.device)
        for output in outputs:
            sums += output["sums"].double()
        local_sums = sums[0].clone()
        acceptance = context.acceptance
        if acceptance is None:
            acceptance = torch.zeros(len(ROWS), num_states, dtype=torch.int64, device=self.device)
        for tensor in (sums, acceptance):
            dist.all_reduce(tensor, group=self.groups.dp_cp)
            if self.groups.pp.size() > 1:
                last = dist.get_process_group_ranks(self.groups.pp)[-1]
                dist.broadcast(tensor, src=last, group=self.groups.pp)
        return StepResult(
            depth_sums=sums[0].cpu(),
            depth_counts=counts.cpu(),
            losses=depth_losses(sums[0], counts).tolist(),
            acceptance=acceptance.cpu(),
            router=self._router_figures(num_micro_batches),
            local_sums=local_sums.cpu(),
        )

    def _router_figures(self, num_micro_batches: int) -> dict[str, float]:
        """Means over MoE layers, micro-batches and data-parallel ranks of what the routers recorded in this step.

        Every rank takes part, those of dense stages too, so that no collective waits. A balancing loss is recorded in parts that
        add up over tensor- and context-parallel ranks, the z-loss as each rank's mean.
        """
        if not self.num_moe_layers:
            return {}
        recorded = router_losses(self.num_layers + self.num_depths)
        ranks = self.groups.tp_dp_cp.size()
        divisors = {
            "seq_load_balancing_loss": self.groups.dp.size(),
            "load_balancing_loss": self.groups.dp.size(),
            "z_loss": ranks,
        }
        totals = torch.zeros(len(divisors), dtype=torch.float64, device=self.device)
        for row, name in enumerate(divisors):
            if name in recorded:
                totals[row] = recorded[name].double().sum()
        dist.all_reduce(totals, group=self.groups.pp)
        dist.all_reduce(totals, group=self.groups.tp_dp_cp)
        figures = {}
        for name, total in zip(divisors, totals.tolist(), strict=True):
            if name in self.router_loss_names:
                figures[name] = total / (divisors[name] * num_micro_batches * self.num_moe_layers)
        return figures
