"""The objective: L_k = sum / N_k over the global batch, total = L_0 + lambda / D * sum_k w_k L_k. The only division by counts.

N_k is known before the backward pass from the masks, summed over micro-batches, data- and context-parallel ranks. The same
sums and counts make the gradient and the log.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21-25, with the mean over valid targets in place of 1/T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def global_counts(local_counts: Tensor, dp_cp_group: ProcessGroup) -> Tensor:
    """N_k: valid targets of each depth in the global batch, [1+D] int64, from this rank's counts of all its micro-batches."""
    counts = local_counts.clone()
    if dp_cp_group.size() > 1:
        dist.all_reduce(counts, group=dp_cp_group)
    return counts


def coefficients(counts: Tensor, loss_factor: float, depth_weights: list[float] | None) -> Tensor:
    """What each depth's sum is multiplied by to form the total: [1+D] fp64, (1, lambda w_k / D) / N_k.

    A depth without valid targets in the global batch gets 0: its sum is 0 too.
    """
    num_depths = counts.numel() - 1
    weights = depth_weights or [1.0] * num_depths
    shares = torch.tensor([1.0, *(loss_factor * w / num_depths for w in weights)], dtype=torch.float64)
    return torch.where(counts.cpu() > 0, shares / counts.cpu().clamp(min=1), 0.0)


@dataclass(slots=True)
class StepObjective:
    """The objective of one optimizer step: made before its first micro-batch, it turns sums into the total.

    Args:
        coefficients: [1+D] fp64 on the CPU, see `coefficients`.
        counts: [1+D] int64, the global N_k.
        num_micro_batches: of this rank.
        dp_cp_size: ranks over which DDP averages gradients.
        z_loss_coeff: on the mean squared log-sum-exp of each depth, weighted as the depth is.
    """

    coefficients: Tensor
    counts: Tensor
    num_micro_batches: int
    dp_cp_size: int
    z_loss_coeff: float = 0.0

    def loss_function(self, sums: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What Megatron-Core's schedules call with the model's output of one micro-batch.

        The schedule divides by the number of micro-batches and DDP averages over the data- and context-parallel
        ranks; both are undone here in advance, since the counts in the coefficients are global already.

        Args:
            sums: [2, 1+D] fp32 from DepthHeads.

        Returns:
            (total * micro-batches * ranks, 1, {"sums": sums}).
        """
        coef = self.coefficients.to(device=sums.device, dtype=torch.float32)
        total = (sums[0] * coef).sum()
        if self.z_loss_coeff:
            total = total + self.z_loss_coeff * (sums[1] * coef).sum()
        one = torch.ones((), dtype=torch.int, device=sums.device)
        return total * (self.num_micro_batches * self.dp_cp_size), one, {"sums": sums.detach()}


def depth_losses(sums: Tensor, counts: Tensor) -> Tensor:
    """L_k in nats per token, [1+D] fp64: global sums over global counts; NaN where a depth has no valid target."""
    return sums.double() / counts.to(sums.device)
