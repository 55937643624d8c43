"""The objective: L_k = sum_k / N_k over the global batch, total = L_0 + lambda / D * sum_k w_k L_k.

N_k is known from the masks before the first micro-batch, summed over micro-batches, data- and context-parallel ranks.
So the heads make their gradient in the forward pass. The same sums and counts make the gradient and the metrics.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21-25, with the mean over valid targets in place of 1/T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.profiler import record_function

from megatron_mtp.data.batch import MicroBatch
from megatron_mtp.errors import ForwardStepError
from megatron_mtp.objective.acceptance import ROWS, acceptance_counts
from megatron_mtp.objective.heads import DepthHeads, HeadOutput
from megatron_mtp.objective.metrics import ROUTER_LOSSES, BatchMetrics, mean
from megatron_mtp.parallel.resolve import ResolvedRun

RESULTS = ("sums", "acceptance")
"""What the loss function of a micro-batch reports: sums [1+D] and acceptance counts [rows, 1+D]."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run minimizes and reports.

    Args:
        run: gives depths, weights and router losses.
        heads: computes each micro-batch's sums on the last stage.
        groups: process groups of the layout.
        device: where the model is.
    """

    run: ResolvedRun
    heads: Callable[[Tensor, Tensor, MicroBatch, Tensor, Tensor | float], HeadOutput]
    groups: ProcessGroupCollection
    device: torch.device

    @classmethod
    def of(cls, run: ResolvedRun, groups: ProcessGroupCollection, device: torch.device) -> Objective:
        """The objective of a resolved run."""
        return cls(run, DepthHeads.of(run, groups.tp), groups, device)

    @property
    def num_depths(self) -> int:
        """MTP depths D."""
        return self.run.depths.count

    def begin(
        self, num_targets: Tensor, loss_factor: float, num_microbatches: int, loss_scale: Tensor | float = 1.0
    ) -> StepObjective:
        """The objective of one global batch. A collective over data- and context-parallel ranks.

        Args:
            num_targets: [1+D] int64, valid targets of this rank's micro-batches.
            loss_factor: lambda.
            num_microbatches: of this rank.
            loss_scale: of fp16, which the optimizer divides out again.
        """
        counts = num_targets.to(self.device, copy=True)
        dist.all_reduce(counts, group=self.groups.dp_cp)
        counts = counts.cpu()
        coefficients = total_coefficients(counts, loss_factor, self.run.depths.weights).to(self.device, torch.float32)
        return StepObjective(self, counts, coefficients, num_microbatches, loss_scale)


@dataclass(frozen=True, slots=True)
class StepObjective:
    """The objective of one global batch, made before its first micro-batch. Forward steps receive it as `context`.

    Args:
        objective: of the run.
        counts: [1+D] int64 on the CPU, the global N_k.
        coefficients: [1+D] fp32 on the device, see `total_coefficients`.
        num_microbatches: of this rank.
        loss_scale: of fp16.
    """

    objective: Objective
    counts: Tensor
    coefficients: Tensor
    num_microbatches: int
    loss_scale: Tensor | float = 1.0

    @property
    def device(self) -> torch.device:
        """Where micro-batches have to be."""
        return self.objective.device

    def heads(self, states: Tensor, weight: Tensor, batch: MicroBatch) -> HeadOutput:
        """The model's output processor on the last stage; see `DepthHeads`."""
        gradient_scale = self.loss_scale * self.objective.groups.dp_cp.size()
        with record_function("heads"):
            return self.objective.heads(states, weight, batch, self.coefficients, gradient_scale)

    def loss_function(
        self, batch: MicroBatch, output: HeadOutput, total: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch. Megatron-Core's schedules call it with `total`, its other arguments bound.

        The schedule divides the loss by the number of micro-batches, and DDP averages gradients over data- and
        context-parallel ranks. The loss is multiplied by both, since the counts in the coefficients are global already.

        Args:
            batch: the micro-batch.
            output: of the heads.
            total: output.total.

        Returns:
            (total * micro-batches * ranks, 1, the micro-batch's sums [1+D] and acceptance counts [rows, 1+D]).
        """
        groups = self.objective.groups
        one = torch.ones((), dtype=torch.int, device=total.device)
        acceptance = acceptance_counts(output.top1, batch.labels, batch.loss_mask, groups.cp)
        found = dict(zip(RESULTS, (output.sums, acceptance), strict=True))
        return total * (self.num_microbatches * groups.dp_cp.size()), one, found

    def metrics(self, outputs: Sequence[dict[str, Tensor]], router_losses: Mapping[str, Tensor] | None) -> BatchMetrics:
        """Metrics of the global batch. One collective over all ranks, in fp64, in which counts below 2^53 are exact.

        Args:
            outputs: of this rank's micro-batches, from `loss_function`; empty before the last stage.
            router_losses: what this rank's routers recorded, name -> [layers]; None in evaluation, where they record
                nothing.

        Raises:
            ForwardStepError: an output holds something else than RESULTS.
        """
        _check_results(outputs)
        groups, num_states = self.objective.groups, len(self.counts)
        sums = torch.zeros(num_states, dtype=torch.float64, device=self.device)
        acceptance = torch.zeros(len(ROWS), num_states, dtype=torch.int64, device=self.device)
        for output in outputs:
            sums += output["sums"].double()
            acceptance += output["acceptance"]
        router = torch.zeros(len(ROUTER_LOSSES), dtype=torch.float64, device=self.device)
        for row, name in enumerate(ROUTER_LOSSES):
            if router_losses and name in router_losses:
                router[row] = router_losses[name].double().sum()
        found = torch.cat((sums, acceptance.flatten().double()))
        if groups.tp.rank() != 0:  # tensor-parallel ranks have found the same; one of them is counted
            found.zero_()
        everything = torch.cat((found, router))
        dist.all_reduce(everything)
        sizes = [num_states, acceptance.numel(), len(ROUTER_LOSSES)]
        depth_sums, accepted, router_sums = everything.cpu().split_with_sizes(sizes)
        return BatchMetrics(
            depth_sums=depth_sums,
            depth_counts=self.counts,
            acceptance=accepted.long().view(acceptance.shape),
            router_sums=router_sums,
            router_counts=self._router_counts(is_recorded=router_losses is not None),
            local_sums=sums.cpu(),
        )

    def _router_counts(self, *, is_recorded: bool) -> Tensor:
        """[len(ROUTER_LOSSES)] int64: how many losses were recorded in this step; 0 for those not in the total.

        A balancing loss is recorded in parts that add up over tensor- and context-parallel ranks, the z-loss as each
        rank's mean.
        """
        run, groups = self.objective.run, self.objective.groups
        ranks = (groups.dp.size(), groups.dp.size(), groups.tp_dp_cp.size())
        losses = self.num_microbatches * run.num_moe_layers if is_recorded else 0
        return torch.tensor(
            [losses * n if name in run.router_loss_names else 0 for name, n in zip(ROUTER_LOSSES, ranks, strict=True)]
        )


def _check_results(outputs: Sequence[Any]) -> None:
    for output in outputs:
        if not isinstance(output, dict) or set(output) != set(RESULTS):
            held = ", ".join(map(repr, output)) if isinstance(output, dict) else f"a {type(output).__name__}"
            raise ForwardStepError(
                f"forward_step: the third result of its loss function holds {held}; it must hold "
                f"{' and '.join(map(repr, RESULTS))}, as context.loss_function returns them, and nothing else would be "
                "logged. Log values of your own from a callback (docs/extending.md, 'A metric')."
            )


def total_coefficients(counts: Tensor, loss_factor: float, depth_weights: Sequence[float]) -> Tensor:
    """What the total multiplies each depth's sum by: [1+D] fp64, (1, lambda w_k / D) / N_k.

    A depth without valid targets in the global batch gets 0: its sum is 0 too.
    """
    shares = [1.0, *(loss_factor * weight / len(depth_weights) for weight in depth_weights)]
    return torch.where(counts > 0, mean(torch.tensor(shares, dtype=torch.float64), counts), 0.0)
